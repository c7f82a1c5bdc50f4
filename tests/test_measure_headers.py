"""Headers of weight files: shapes, dtypes and places."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_metagpt.measure import headers
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.headers import Header, read_header
from mergekit_metagpt.measure.loaders import forget_files

TENSORS = {
    "model.layers.0.w": torch.ones(3, 4),
    "model.norm": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.ones(0, 2),
    "one": torch.tensor(1),
}


def nested(tensors, path):
    torch.save({"state_dict": tensors, "epoch": 3}, path)


@pytest.mark.parametrize("save", [save_file, torch.save, nested])
def test_a_base_is_described_without_its_data(save, tmp_path):
    path = tmp_path / ("model.safetensors" if save is save_file else "pytorch_model.bin")
    save(TENSORS, path)
    found = read_header(str(path), "some model")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        header = found[name]
        assert (header.shape, header.torch_dtype) == (tuple(tensor.shape), tensor.dtype)
    for base in (str(path), str(tmp_path)):
        models = Checkpoints.of(base, [base])
        assert models.parameters_of_base() == 12 + 5 + 1
        assert models.shape_of_base("model.layers.7.w") == (3, 4)
        assert models.shape_of_base("lost") is None
    forget_files()


def test_a_header_is_read_again_only_if_the_file_changes(tmp_path, monkeypatch):
    path = str(tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(4)}, path)
    first = read_header(path, "m")["w"]
    before = Path(path).stat()
    save_file({"w": torch.zeros(2, 2)}, str(tmp_path / "new"))
    with monkeypatch.context() as patch:
        patch.setattr(headers, "safe_open", None)
        assert read_header(path, "m")["w"] == first == Header((4,), "F32", path)
    (tmp_path / "new").replace(path)  # of another inode
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_header(path, "m")["w"].shape == (2, 2)
