"""The record of a merge, and the command that repeats it."""

import json
import shlex
from pathlib import Path

import pytest
import reference
import torch
from conftest import merge_config, read, write_yaml
from huggingface_hub import ModelCard
from test_merging_whole import merge

from mergekit_metagpt.measure.identity import sha256_of


def record_of(out: Path):
    return json.loads((out / "metagpt.json").read_text())


def repeated(out: Path) -> list[str]:
    """Return the options of the card's command that repeats the merge."""
    text = (out / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("mergekit-yaml ")]
    return shlex.split(line)[3:]


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_a_merge_is_that_of_the_formula_and_its_record_says_so(granularity, family, tmp_path):
    config = merge_config(family, parameters={"granularity": granularity})
    yml, out = write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "new" / "merged"
    merge(yml, out, "--random-seed", 5)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    base, *experts = map(read, family.values())
    rows = reference.coefficients(base, experts, granularity)
    reference.assert_merged(read(out), base, experts, rows)

    record = record_of(out)
    scopes = {reference.scope(name, granularity): row for name, row in rows.items()}
    assert record["coefficients"].keys() == scopes.keys()
    for name, row in scopes.items():
        assert record["coefficients"][name]["coefficients"] == pytest.approx(row, rel=1e-6)
    norms = sum(reference.squared_norms(base, experts).values())
    found = [expert["squared_norm"] for expert in record["experts"]]
    assert found == pytest.approx(norms, rel=1e-6)
    assert record["config"] == yml.read_text()
    assert record["granularity"] == [granularity]
    assert record["seed"] == 5
    assert {model["model"] for model in record["inputs"]} == set(family.values())
    (file,) = record["inputs"][0]["files"]
    path = Path(record["inputs"][0]["model"], file["name"])
    assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_of(path))
    assert {"mergekit", "torch", "transformers", "mergekit-metagpt"} <= record["versions"].keys()
    assert record["times"].keys() == {"started", "finished"}
    # A plain merge does not depend on threads.
    assert repeated(out) == ["--random-seed", "5", "--no-copy-tokenizer"]


def test_a_record_shows_priors_that_vary_within_the_model(family, tmp_path):
    config = merge_config(family, parameters={"granularity": "model"})
    config["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.1}, {"value": 1}]}
    merge(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "merged")
    record = record_of(tmp_path / "merged")
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    assert [e["squared_norm"] for e in record["experts"]] == pytest.approx(norms, rel=1e-6)
    assert len({tuple(r["coefficients"]) for r in record["coefficients"].values()}) == 2


def test_the_cards_command_repeats_the_merge_to_the_byte(family, tmp_path):
    config = merge_config(family, "metagpt_dare_ties", parameters={"density": 0.5})
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    merge(write_yaml(tmp_path / "metagpt.yml", config), one, "--out-shard-size", "20K")
    words = repeated(one)
    seed = record_of(one)["seed"]  # follows from the merge
    assert words == [
        "--random-seed", str(seed), "--out-shard-size", "20000", "--no-copy-tokenizer",
        "--num-threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    assert record_of(one)["options"] == words[2:]
    merge(one / "mergekit_config.yml", two, *words[:4])
    merge(one / "mergekit_config.yml", other, "--random-seed", seed - 1, *words[2:4])
    files = [{p.name: p.read_bytes() for p in o.glob("*.safetensors")} for o in (one, two, other)]
    assert len(files[0]) > 1
    assert files[0] == files[1] != files[2]
    card = ModelCard.load(one / "README.md").text
    assert "# one" in card
    assert "created using [mergekit]" in card
    assert f"| {family['a']} | " in card
