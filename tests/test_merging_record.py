"""The record of a merge, what it prints, and the command that repeats it."""

import json
import shlex

import torch
from click.testing import CliRunner
from conftest import llama_config, merge_config, save_family, write_yaml
from huggingface_hub import ModelCard

from mergekit_metagpt.cli import main


def merge(*words):
    done = CliRunner().invoke(main, ["merge", *map(str, words), "--no-copy-tokenizer"])
    assert done.exit_code == 0, done.output
    return done


def the_end(out):
    """Return the last lines that a merge prints."""
    return f"The merge is in {out}. To publish it:\nhf upload USER/NAME {out}\n"


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


def test_a_merge_prints_coefficients_warnings_and_the_path(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1, 0.0))
    yml = write_yaml(
        tmp_path / "metagpt.yml", merge_config(paths, parameters={"granularity": "model"})
    )
    done = merge(yml, tmp_path / "out")
    shares = json.loads((tmp_path / "out" / "metagpt.json").read_text())["experts"]
    for expert in shares:
        assert f" {expert['coefficient']:.4f} " in done.stdout
    assert done.stdout.endswith(the_end(tmp_path / "out"))
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
    assert merge(yml, tmp_path / "out").stdout == the_end(tmp_path / "out")
