"""The model card of a merge, and the names that stand for paths in what is published."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import invoke, llama_config, merge_config, write_yaml
from huggingface_hub import ModelCard
from paper_stand_ins import save_model

from mergekit_metagpt.merging.card import write_card
from mergekit_metagpt.merging.record import renamed

README = Path(__file__).parents[1] / "README.md"
NAMES = {"base": "jane/llama", "a": "jane/llama-math", "b": "jane/llama-code"}


def merge(*words, status=0):
    return invoke("merge", *words, status=status)


def code_blocks(text, language):
    return [b.partition("```")[0] for b in text.split(f"```{language}\n")[1:]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two experts with tokenizers, by their paths."""
    place = tmp_path_factory.mktemp("private")
    paths = {name: str(place / name) for name in NAMES}
    for path in paths.values():
        save_model(Path(path), tokens=llama_config().vocab_size)
    return paths


@pytest.fixture
def yml(models, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(models))


@pytest.fixture(scope="module")
def published(models, tmp_path_factory):
    """A merge of models that all have a name on the hub."""
    place = tmp_path_factory.mktemp("published")
    text = yaml.safe_dump(merge_config(models), sort_keys=False)
    (place / "c.yml").write_text(f"# {models['a']} is better than {models['b']}.\n{text}")
    given = [f"--name-of={path}={NAMES[name]}" for name, path in models.items()]
    merge(place / "c.yml", place / "merged", *given)
    return place / "merged"


class TestNames:
    def test_they_stand_in_all_that_is_published_and_no_path_does(self, published):
        for file in published.iterdir():
            assert b"private" not in file.read_bytes(), file
        card = ModelCard.load(published / "README.md")
        assert "using [jane/llama](https://huggingface.co/jane/llama) as a base." in card.text
        assert "\n* [jane/llama-math](https://huggingface.co/jane/llama-math)\n" in card.text
        assert "\n| [jane/llama-code](https://huggingface.co/jane/llama-code) |" in card.text
        written = (published / "mergekit_config.yml").read_text()
        assert written in card.text
        assert yaml.safe_load(written) == merge_config(NAMES)
        record = json.loads((published / "metagpt.json").read_text())
        assert (record["config"], record["base"]) == (written, "jane/llama")
        assert {model["model"] for model in record["inputs"]} == set(NAMES.values())
        assert [e["model"] for e in record["experts"]] == ["jane/llama-math", "jane/llama-code"]

    def test_each_stands_for_its_own_model(self, published, models, yml, tmp_path, monkeypatch):
        """As a merge without names shows; nor has it a picture or code to load it."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        merge(yml, tmp_path / "plain", "--no-copy-tokenizer")
        records = [
            json.loads((out / "metagpt.json").read_text())
            for out in (published, tmp_path / "plain")
        ]
        there, here = ({e.pop("model"): e for e in record["experts"]} for record in records)
        assert all(there[NAMES[name]] == here[models[name]] for name in ("a", "b"))
        assert records[0]["coefficients"] == records[1]["coefficients"]
        card = ModelCard.load(tmp_path / "plain" / "README.md")
        assert card.data.base_model is None
        assert "coefficients.png" not in card.text
        assert not (tmp_path / "plain" / "coefficients.png").exists()
        assert code_blocks(card.text, "python") == []

    def test_a_snapshot_in_the_hubs_cache_has_one_and_a_path_stays(self, models, tmp_path):
        revision = "0123456789" * 4
        cached = tmp_path / "hub" / "models--joe--fine-tune" / "snapshots" / revision
        shutil.copytree(models["a"], cached)
        config = write_yaml(tmp_path / "m.yml", merge_config({**models, "a": str(cached)}))
        merge(config, tmp_path / "merged", f"--name-of={models['b']}=jane/llama-code")
        card = ModelCard.load(tmp_path / "merged" / "README.md")
        assert sorted(card.data.base_model) == ["jane/llama-code", "joe/fine-tune"]
        assert "\n* [joe/fine-tune](https://huggingface.co/joe/fine-tune)\n" in card.text
        assert f"- model: joe/fine-tune@{revision}\n" in card.text
        assert str(cached) not in (tmp_path / "merged" / "metagpt.json").read_text()
        assert models["base"] in card.text.replace("\\", "")

    def test_one_that_exists_here_too_is_of_the_hub_if_so_given(
        self, models, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(huggingface_hub, "repo_exists", None)  # nor is the hub asked
        for name, path in models.items():
            shutil.copytree(path, tmp_path / NAMES[name])
        monkeypatch.chdir(tmp_path)
        yml, given = write_yaml(tmp_path / "metagpt.yml", merge_config(NAMES)), NAMES.values()
        merge(yml, "named", *(f"--name-of={name}={name}" for name in given))
        assert ModelCard.load("named/README.md").data.base_model == sorted(given)
        merge(yml, "plain")
        card = ModelCard.load("plain/README.md")
        assert card.data.base_model is None
        assert "\n* jane/llama-math\n" in card.text

    def test_they_stand_for_models_only(self):
        config = {
            "merge_method": "ties",
            "models": [{"model": "ties+lora@main"}, {"model": {"model": {"path": "ties"}}}],
            "parameters": {"weight": [{"filter": "ties", "value": 1}]},
            "tokenizer": {
                "source": "union",
                "tokens": {"ties": {"source": "base+ties"}},
                5: "ties",
            },
        }
        names = {"ties": "joe/ties", "base": "joe/base", "lora": "joe/lora"}
        assert renamed(config, lambda path: names.get(path, path)) == {
            **config,
            "models": [
                {"model": "joe/ties+joe/lora@main"},
                {"model": {"model": {"path": "joe/ties"}}},
            ],
            "tokenizer": {
                "source": "union",
                "tokens": {"ties": {"source": "joe/base+joe/ties"}},
                5: "ties",
            },
        }

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            (["{a}x=jane/math"], "names no path of the config; write {a} instead."),
            (["metagpt=jane/math"], "names no path of the config"),
            (["{a}=math"], "gives no name of the hub; write {a}=USER/NAME."),
            (["{a}=https://huggingface.co/jane/math"], "gives no name of the hub"),
            (["{a}=jane/x", "{b}=jane/x"], "{b}=jane/x gives two models one name"),
        ],
    )
    def test_a_wrong_one_is_refused_before_anything_is_merged(
        self, given, sentence, models, yml, tmp_path
    ):
        words = [f"--name-of={name.format(**models)}" for name in given]
        done = merge(yml, tmp_path / "out", *words, status=1)
        assert sentence.format(**models) in done.stderr
        assert not (tmp_path / "out").exists()


class TestTheText:
    def test_names_are_text_in_it(self, tmp_path):
        expert = {"norm": 1.0, "coefficient": 1.0, "least": 1.0, "largest": 1.0}
        model = "/models/a|b_<i>_`c`+org/lora"
        raw = merge_config({"base": "/models/*base*", "a": model})
        record = {
            "config": yaml.safe_dump(raw),
            "experts": [expert | {"model": model}],
            "granularity": ["model"],
            "versions": {"mergekit-metagpt": "1", "mergekit": "2"},
            "seed": None,
            "options": ["--lora-merge-dtype", "bfloat16"],
        }
        write_card(tmp_path, "[x](y)", record, [])
        text = ModelCard.load(tmp_path / "README.md").text
        name = r"/models/a\|b\_\<i\>\_\`c\` + [org/lora](https://huggingface.co/org/lora)"
        assert f"\n| {name} | 1 | 1 |\n" in text
        assert f"\n* {name}\n" in text
        assert r"using /models/\*base\* as a base." in text
        assert "# \\[x\\](y)\n" in text
        assert "mergekit-yaml mergekit_config.yml merged --lora-merge-dtype bfloat16" in text
        assert "### Usage" not in text  # there is no model beside it

    def test_its_code_loads_the_merge(self, published):
        (code,) = code_blocks((published / "README.md").read_text(), "python")
        assert len(code.replace("\n\n", "\n").splitlines()) == 4
        scope = {}
        exec(code.replace("USER/NAME", str(published)), scope)
        assert scope["model"].config.vocab_size == len(scope["tokenizer"])

    def test_it_cites_the_paper_shows_a_picture_and_has_metadata(self, published):
        card = ModelCard.load(published / "README.md")
        (cited,) = code_blocks(card.text, "bibtex")
        assert cited in README.read_text("utf-8")
        assert "by layer](coefficients.png)" in card.text
        picture = (published / "coefficients.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000
        assert card.data.to_dict() == {
            "base_model": sorted(NAMES.values()),
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["mergekit", "merge", "metagpt-merge"],
        }

    def test_that_of_a_stock_method_has_no_coefficients(self, models, tmp_path):
        config = merge_config(models, "task_arithmetic", parameters={"weight": 0.3})
        out = tmp_path / "merged"
        done = merge(write_yaml(tmp_path / "m.yml", config), out)
        published = f"The merge is in {out}. To publish it:\nhf upload USER/NAME {out}\n"
        assert done.stdout == published  # nor are any printed
        card = ModelCard.load(out / "README.md")
        assert card.data.tags == ["mergekit", "merge"]
        assert "Scaling coefficients" not in card.text
        assert "### Usage" in card.text
