"""Headers of weight files: shapes, dtypes and places; and what the disk reads ahead of them."""

import os
from pathlib import Path

import pytest
import torch
from conftest import merge_config
from safetensors.torch import load_file, save_file

from mergekit_metagpt.measure import checkpoints, headers, loaders
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.headers import Header, read_header
from mergekit_metagpt.measure.loaders import forget_files, read_ahead

TENSORS = {
    "model.layers.0.w": torch.ones(3, 4),
    "model.norm": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.ones(0, 2),
    "one": torch.tensor(1),
}


def legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def nested(tensors, path):
    torch.save({"state_dict": tensors, "epoch": 3}, path)


@pytest.mark.parametrize(
    ("save", "file"),
    [
        (save_file, "model.safetensors"),
        (torch.save, "pytorch_model.bin"),
        (legacy, "pytorch_model.bin"),
        (nested, "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("is_file", [True, False])
def test_a_base_is_described_without_its_data(is_file, save, file, tmp_path):
    path = tmp_path / file
    save(TENSORS, path)
    data = path.read_bytes()
    found = read_header(str(path), "some model")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        header = found[name]
        assert (header.shape, header.torch_dtype) == (tuple(tensor.shape), tensor.dtype)
        if save is save_file:
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[header.start : header.end] == raw
    base = str(path if is_file else tmp_path)
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
        size = before.st_size
        assert read_header(path, "m")["w"] == first == Header((4,), "F32", path, size - 16, size)
    (tmp_path / "new").replace(path)  # of another inode
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_header(path, "m")["w"].shape == (2, 2)


class TestReadingAhead:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Collect the byte ranges that are asked for; the window is 1000 bytes."""
        if not hasattr(os, "posix_fadvise"):
            pytest.skip("this system cannot be asked")
        ranges = []
        monkeypatch.setattr(
            os, "posix_fadvise", lambda _, *place_and_advice: ranges.append(place_and_advice[:2])
        )
        monkeypatch.setattr(loaders, "_WINDOW", 1000)
        monkeypatch.setattr(loaders, "_ASKED", {})
        return ranges

    @pytest.mark.parametrize(
        ("tensors", "expected"),
        [
            # Each time half of the window is used up, the rest of the next one is asked for.
            (range(5), [(0, 1000), (1000, 800), (1800, 800)]),
            ((9, 0, 9), [(3600, 1000), (0, 1000), (3600, 1000)]),
            ((4, 2, 3), [(1600, 1000)]),
        ],
        ids=["forwards", "jumps", "small steps back"],
    )
    def test_a_window_moves_along_the_file(self, tensors, expected, asked, tmp_path):
        file = str(tmp_path / "model.safetensors")
        save_file({f"w{n}": torch.full((100,), float(n)) for n in range(10)}, file)
        for number in tensors:
            read_ahead(file, f"w{number}")
        first = read_header(file, file)["w0"].start
        assert [(start - first, size) for start, size in asked] == expected

    def test_a_changed_file_is_looked_at_again(self, asked, tmp_path):
        file = str(tmp_path / "model.safetensors")
        save_file({"w": torch.zeros(3)}, file)
        read_ahead(file, "w")
        save_file({"new": torch.zeros(3000), "w1": torch.zeros(3)}, file)
        os.utime(file, (1, 1))
        read_ahead(file, "w")  # no longer there
        read_ahead(file, "w1")  # now far from the start
        assert [start for start, _ in asked][1:] == [read_header(file, file)["w1"].start]

    @pytest.mark.parametrize("granularity", ["tensor", "model"])
    def test_it_is_done_by_merges(self, granularity, family, merge, monkeypatch):
        begun = []
        monkeypatch.setattr(checkpoints, "read_ahead", lambda *place: begun.append(place))
        merge(merge_config(family, parameters={"granularity": granularity}))
        files = {f"{path}/model.safetensors" for path in family.values()}
        tensors = set(load_file(f"{family['base']}/model.safetensors"))
        assert set(begun) == {(file, tensor) for file in files for tensor in tensors}

    def test_pickles_are_left_alone(self, asked, tmp_path):
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
        models = Checkpoints.of(str(tmp_path), [])
        models.read_ahead(models.base, "model.norm")
        models.read_ahead(models.base, "unknown")
        assert asked == []
        forget_files()
