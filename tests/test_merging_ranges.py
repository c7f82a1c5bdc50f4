"""Merges that are read back, to see whether they fit into ``out_dtype``."""

import shutil

import pytest
import torch
from conftest import merge_config, write_yaml
from test_merging_whole import WHOLE, merge, names


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "merged"


def test_paths_that_hold_the_characters_of_references(family, tmp_path):
    place = tmp_path / "a+b+c@d@e"
    models = {name: shutil.copytree(path, place / name) for name, path in family.items()}
    base, *experts = ({"model": {"path": str(path)}} for path in models.values())
    config = {
        "merge_method": "metagpt",
        "base_model": base,
        "models": [{"model": expert} for expert in experts],
        "out_dtype": "float16",
    }
    out = place / "merged+x@y@z"
    merge(write_yaml(tmp_path / "metagpt.yml", config), out)
    assert names(out) == WHOLE
    assert str(models["a"]) in (out / "README.md").read_text()


def test_pickled_files(family, out, tmp_path):
    config = merge_config(family, out_dtype="float16")
    merge(write_yaml(tmp_path / "m.yml", config), out, "--no-safe-serialization")
    tensors = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_no_other_merge_is_read_back(family, out, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.merging.shard._overflowing", None)
    config = merge_config(family, out_dtype="bfloat16")
    merge(write_yaml(tmp_path / "metagpt.yml", config), out)
    assert names(out) == WHOLE
