"""Merges that are read back, to see whether they fit into ``out_dtype``."""

import shutil

import pytest
import torch
from conftest import llama_config, merge_config, save_family, write_yaml
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize(
    ("method", "dtype", "out_dtype"),
    [("metagpt", None, "bfloat16"), ("linear", None, "float32"), ("linear", "float64", "float32")],
)
def test_float64_can_overflow_what_is_narrower(method, dtype, out_dtype, out, tmp_path):
    paths = save_family(tmp_path, llama_config(num_hidden_layers=1), dtype=torch.float64)
    for path in paths.values():
        tensors = load_file(f"{path}/model.safetensors")
        tensors["model.norm.weight"] *= 1e39
        save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    parameters = {"weight": 0.5} if method == "linear" else {}
    config = merge_config(paths, method, dtype=dtype, out_dtype=out_dtype, parameters=parameters)
    done = merge(write_yaml(tmp_path / "metagpt.yml", config), out, status=1)
    assert f"overflows torch.{out_dtype}" in done.stderr
    assert "out_dtype: float64" in done.stderr
    assert not names(out.parent)


def test_no_other_merge_is_read_back(family, out, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.merging.ranges._overflowing", None)
    config = merge_config(family, out_dtype="bfloat16")
    merge(write_yaml(tmp_path / "metagpt.yml", config), out)
    assert names(out) == WHOLE
