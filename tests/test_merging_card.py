"""The model card of a merge: what people read, and what the hub reads."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import llama_config, merge_config, write_yaml
from huggingface_hub import ModelCard, ModelCardData
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from paper_stand_ins import save_model

from mergekit_metagpt.cli import main
from mergekit_metagpt.merging.card import write_card

README = Path(__file__).parents[1] / "README.md"
NAMES = {"base": "jane/llama", "a": "jane/llama-math", "b": "jane/llama-code"}


def merge(*words, status=0):
    done = CliRunner().invoke(main, ["merge", *map(str, words), "--quiet"])
    assert done.exit_code == status, done.output
    return done


def names_of(paths):
    return [f"--name-of={path}={NAMES[name]}" for name, path in paths.items()]


@pytest.fixture
def models(tmp_path):
    """A base and two experts with tokenizers, by their paths."""
    paths = {name: str(tmp_path / "private" / name) for name in NAMES}
    for path in paths.values():
        save_model(Path(path), tokens=llama_config().vocab_size)
    return paths


@pytest.fixture
def yml(models, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(models))


class TestNames:
    def test_they_stand_in_all_that_is_published_and_no_path_does(self, models, tmp_path):
        config = tmp_path / "metagpt.yml"
        text = yaml.safe_dump(merge_config(models), sort_keys=False)
        config.write_text(f"# {models['a']} is better than {models['b']}.\n{text}")
        out = tmp_path / "merged"
        merge(config, out, *names_of(models))
        for file in out.iterdir():
            assert b"private" not in file.read_bytes(), file
        card = ModelCard.load(out / "README.md")
        assert card.data.base_model == sorted(NAMES.values())
        assert "using [jane/llama](https://huggingface.co/jane/llama) as a base." in card.text
        assert "\n* [jane/llama-math](https://huggingface.co/jane/llama-math)\n" in card.text
        assert "\n| [jane/llama-code](https://huggingface.co/jane/llama-code) |" in card.text
        written = (out / "mergekit_config.yml").read_text()
        assert written in card.text
        assert yaml.safe_load(written) == merge_config(NAMES)
        record = json.loads((out / "metagpt.json").read_text())
        assert record["config"] == written
        assert {model["model"] for model in record["inputs"]} == set(NAMES.values())
        assert [e["model"] for e in record["experts"]] == ["jane/llama-math", "jane/llama-code"]

    def test_each_stands_for_its_own_model(self, models, yml, tmp_path):
        merge(yml, tmp_path / "named", *names_of(models))
        merge(yml, tmp_path / "not")
        named, plain = (
            json.loads((tmp_path / out / "metagpt.json").read_text()) for out in ("named", "not")
        )
        for record in (named, plain):
            record["by model"] = {e.pop("model"): e for e in record["experts"]}
        for name in ("a", "b"):
            assert named["by model"][NAMES[name]] == plain["by model"][models[name]]
        for tensor, row in named["coefficients"].items():
            assert row["coefficients"] == plain["coefficients"][tensor]["coefficients"]

    def test_a_snapshot_in_the_hubs_cache_has_one(self, models, tmp_path):
        revision = "0123456789" * 4
        cached = tmp_path / "hub" / "models--joe--fine-tune" / "snapshots" / revision
        shutil.copytree(models["a"], cached)
        config = merge_config({**models, "a": str(cached)})
        merge(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "merged")
        card = ModelCard.load(tmp_path / "merged" / "README.md")
        assert card.data.base_model == ["joe/fine-tune"]
        assert "\n* [joe/fine-tune](https://huggingface.co/joe/fine-tune)\n" in card.text
        assert f"- model: joe/fine-tune@{revision}\n" in card.text
        assert str(cached) not in (tmp_path / "merged" / "metagpt.json").read_text()

    def test_one_that_exists_here_too_is_of_the_hub(self, models, tmp_path, monkeypatch):
        for name, path in models.items():
            shutil.copytree(path, tmp_path / NAMES[name])
        monkeypatch.chdir(tmp_path)
        given = [f"--name-of={name}={name}" for name in NAMES.values()]
        merge(write_yaml(tmp_path / "metagpt.yml", merge_config(NAMES)), "merged", *given)
        assert ModelCard.load("merged/README.md").data.base_model == sorted(NAMES.values())

    def test_without_one_a_path_stays_and_is_no_base_model(self, models, yml, tmp_path):
        merge(yml, tmp_path / "merged", f"--name-of={models['a']}=jane/llama-math")
        card = ModelCard.load(tmp_path / "merged" / "README.md")
        assert card.data.base_model == ["jane/llama-math"]
        assert models["base"] in card.text.replace("\\", "")

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("{a}x=jane/math", "names no path of the config; write {a} instead."),
            ("{a}=math", "gives no name of the hub; write {a}=USER/NAME."),
            ("{a}=https://huggingface.co/jane/math", "gives no name of the hub"),
        ],
    )
    def test_a_wrong_one_is_refused_before_anything_is_merged(
        self, given, sentence, models, yml, tmp_path
    ):
        done = merge(yml, tmp_path / "out", "--name-of", given.format(**models), status=1)
        assert sentence.format(**models) in done.stderr
        assert not (tmp_path / "out").exists()


class TestTheText:
    def test_names_are_text_in_it(self, tmp_path):
        expert = {"norm": 1.0, "coefficient": 1.0, "least": 1.0, "largest": 1.0}
        model = "/models/a|b_<i>_`c`+org/lora"
        record = {
            "experts": [expert | {"model": model}],
            "granularity": ["model"],
            "versions": {"mergekit-metagpt": "1", "mergekit": "2"},
            "seed": None,
            "options": ["--lora-merge-dtype", "bfloat16"],
        }
        config = MergeConfiguration.model_validate(
            {
                "merge_method": "metagpt",
                "base_model": "/models/*base*",
                "models": [{"model": ModelReference.model_validate(model)}],
            }
        )
        write_card(tmp_path / "README.md", "[x](y)", config, "source: |", record, [])
        text = ModelCard.load(tmp_path / "README.md").text
        name = r"/models/a\|b\_\<i\>\_\`c\` + [org/lora](https://huggingface.co/org/lora)"
        assert f"\n| {name} | 1 | 1 |\n" in text
        assert f"\n* {name}\n" in text
        assert r"using /models/\*base\* as a base." in text
        assert "# \\[x\\](y)\n" in text
        assert "mergekit-yaml mergekit_config.yml merged --lora-merge-dtype bfloat16" in text
        assert "### Usage" not in text  # there is no model beside it

    def test_its_code_loads_the_merge(self, yml, tmp_path):
        out = tmp_path / "merged"
        merge(yml, out)
        (code,) = code_blocks((out / "README.md").read_text(), "python")
        assert len(code.replace("\n\n", "\n").splitlines()) == 4
        scope = {}
        exec(code.replace("USER/NAME", str(out)), scope)
        assert scope["model"].config.vocab_size == len(scope["tokenizer"])

    def test_without_a_tokenizer_there_is_no_code(self, yml, tmp_path):
        merge(yml, tmp_path / "merged", "--no-copy-tokenizer")
        assert code_blocks((tmp_path / "merged" / "README.md").read_text(), "python") == []

    def test_it_cites_the_paper_as_the_readme_does(self, yml, tmp_path):
        merge(yml, tmp_path / "merged")
        (cited,) = code_blocks((tmp_path / "merged" / "README.md").read_text(), "bibtex")
        assert cited in README.read_text("utf-8")

    def test_it_shows_the_picture_beside_it(self, yml, tmp_path):
        merge(yml, tmp_path / "merged")
        assert "by layer](coefficients.png)" in (tmp_path / "merged" / "README.md").read_text()
        picture = (tmp_path / "merged" / "coefficients.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000

    def test_without_matplotlib_there_is_none(self, yml, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        merge(yml, tmp_path / "merged")
        assert "coefficients.png" not in (tmp_path / "merged" / "README.md").read_text()
        assert not (tmp_path / "merged" / "coefficients.png").exists()

    def test_the_card_of_a_stock_method_has_no_coefficients(self, models, tmp_path):
        config = merge_config(models, "task_arithmetic", parameters={"weight": 0.3})
        merge(write_yaml(tmp_path / "m.yml", config), tmp_path / "merged")
        card = ModelCard.load(tmp_path / "merged" / "README.md")
        assert card.data.tags == ["mergekit", "merge"]
        assert "Scaling coefficients" not in card.text
        assert "### Usage" in card.text


class TestTheMetadata:
    def test_the_hubs_own_classes_read_it(self, models, yml, tmp_path):
        merge(yml, tmp_path / "merged", *names_of(models))
        data = ModelCard.load(tmp_path / "merged" / "README.md").data
        assert data.to_dict() == {
            "base_model": sorted(NAMES.values()),
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["mergekit", "merge", "metagpt-merge"],
        }
        assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()


def code_blocks(text, language):
    return [b.partition("```")[0] for b in text.split(f"```{language}\n")[1:]]
