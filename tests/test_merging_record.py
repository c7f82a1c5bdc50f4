"""The record and the model card of a merge."""

import json
import shlex

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, merge_config, save_family, write_yaml
from huggingface_hub import ModelCard
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_metagpt.cli import main
from mergekit_metagpt.merging.record import write_card


def merge(*words):
    done = CliRunner().invoke(main, ["merge", *map(str, words), "--no-copy-tokenizer"])
    assert done.exit_code == 0, done.output
    return done


def repeated(card: ModelCard) -> list[str]:
    """Return the words of the card's command that repeats the merge."""
    (line,) = [line for line in card.text.splitlines() if line.startswith("mergekit-yaml ")]
    return shlex.split(line)[3:]


def test_the_cards_command_repeats_the_merge_to_the_byte(family, tmp_path):
    config = merge_config(family, "metagpt_dare_ties", parameters={"density": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    one, two = tmp_path / "one", tmp_path / "two"
    merge(yml, one, "--out-shard-size", "20K")
    words = repeated(ModelCard.load(one / "README.md"))
    assert words[0] == "--random-seed"
    assert int(words[1]) < 2**32
    assert words[2:] == [
        "--out-shard-size", "20000", "--no-copy-tokenizer",
        "--num-threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    merge(one / "mergekit_config.yml", two, *words[:4])
    files = [{p.name: p.read_bytes() for p in out.glob("*.safetensors")} for out in (one, two)]
    assert len(files[0]) > 1
    assert files[0] == files[1]
    assert json.loads((one / "metagpt.json").read_text())["options"] == words[2:]


def test_a_plain_merge_names_no_threads(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    merge(yml, tmp_path / "out")
    words = repeated(ModelCard.load(tmp_path / "out" / "README.md"))
    assert words[2:] == ["--no-copy-tokenizer"]


@pytest.fixture
def record():
    expert = {"norm": 1.0, "coefficient": 1.0, "least": 1.0, "largest": 1.0}
    return {
        "experts": [expert | {"model": "/models/a|b_<i>_`c`+org/lora"}],
        "granularity": ["model"],
        "versions": {"mergekit-metagpt": "1", "mergekit": "2"},
        "seed": None,
        "options": ["--lora-merge-dtype", "bfloat16"],
    }


def test_names_are_text_in_the_card(record, tmp_path):
    expert = ModelReference.model_validate(record["experts"][0]["model"])
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "metagpt",
            "base_model": "/models/*base*",
            "models": [{"model": expert}],
        }
    )
    write_card(tmp_path / "README.md", "[x](y)", config, "source: |", record)
    card = ModelCard.load(tmp_path / "README.md")
    name = r"/models/a\|b\_\<i\>\_\`c\` + [org/lora](https://huggingface.co/org/lora)"
    assert f"\n| {name} | 1 | 1 |\n" in card.text
    assert f"\n* {name}\n" in card.text
    assert r"using /models/\*base\* as a base." in card.text
    assert "# \\[x\\](y)\n" in card.text
    assert repeated(card) == ["--lora-merge-dtype", "bfloat16"]


def test_a_merge_prints_coefficients_warnings_and_the_path(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1, 0.0))
    yml = write_yaml(
        tmp_path / "metagpt.yml", merge_config(paths, parameters={"granularity": "model"})
    )
    done = merge(yml, tmp_path / "out")
    shares = json.loads((tmp_path / "out" / "metagpt.json").read_text())["experts"]
    for expert in shares:
        assert f" {expert['coefficient']:.4f} " in done.stdout
    assert done.stdout.endswith(f"The merge is in {tmp_path / 'out'}.\n")
    dominant, equal = done.stderr.splitlines()[-2:]
    assert f"Warning: {paths['b']} has 99.0% of the merge" in dominant
    assert "set exponent: 1, which gives 0.09" in dominant
    assert f"{paths['c']} is equal to the base" in equal
    quiet = merge(yml, tmp_path / "quiet", "--quiet")
    assert quiet.stdout == ""
    assert "has 99.0% of the merge" in quiet.stderr


def test_a_merge_by_a_stock_method_prints_the_path(family, tmp_path):
    parameters = {"weight": 0.3}
    yml = write_yaml(
        tmp_path / "m.yml", merge_config(family, "task_arithmetic", parameters=parameters)
    )
    assert merge(yml, tmp_path / "out").stdout == f"The merge is in {tmp_path / 'out'}.\n"
