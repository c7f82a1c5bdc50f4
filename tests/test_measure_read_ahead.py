"""Reading ahead: what the operating system is asked for, and when."""

import os
from pathlib import Path

import pytest
import torch
from conftest import merge_config
from safetensors.torch import load_file, save_file

from mergekit_metagpt.measure import read_ahead
from mergekit_metagpt.measure.headers import read_header


@pytest.fixture
def asked(monkeypatch):
    """Collect the byte ranges that are asked for; the window is 1000 bytes."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be asked")
    ranges = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda number, start, size, advice: ranges.append((start, size))
    )
    monkeypatch.setattr(read_ahead, "_WINDOW", 1000)
    monkeypatch.setattr(read_ahead, "AHEAD", read_ahead._ReadAhead())
    return ranges


@pytest.fixture
def file(tmp_path):
    """A file of ten tensors of 400 bytes."""
    path = tmp_path / "model.safetensors"
    save_file({f"w{n}": torch.full((100,), float(n)) for n in range(10)}, path)
    return str(path)


def starts(file):
    found = {name: header.start for name, header in read_header(file, file).items()}
    data = Path(file).read_bytes()
    for name, tensor in load_file(file).items():
        assert data[found[name] :][:400] == tensor.numpy().tobytes()
    return [found[f"w{n}"] for n in range(10)]


def test_a_window_moves_along_the_file_and_is_asked_for_once(file, asked):
    places = starts(file)
    for number in range(5):
        read_ahead.AHEAD.begin(file, f"w{number}")
    # Each time half of the window is used up, the rest of the next one is asked for.
    assert asked == [(places[0], 1000), (places[0] + 1000, 800), (places[2] + 1000, 800)]


def test_a_jump_starts_anew(file, asked):
    places = starts(file)
    for number in (9, 0, 9):
        read_ahead.AHEAD.begin(file, f"w{number}")
    assert asked == [(places[9], 1000), (places[0], 1000), (places[9], 1000)]


def test_small_steps_back_ask_for_nothing(file, asked):
    for number in (4, 2, 3):
        read_ahead.AHEAD.begin(file, f"w{number}")
    assert len(asked) == 1


def test_a_changed_file_is_looked_at_again(file, asked):
    read_ahead.AHEAD.begin(file, "w0")
    save_file({"new": torch.zeros(3000), "w1": torch.zeros(3)}, file)
    os.utime(file, (1, 1))
    read_ahead.AHEAD.begin(file, "w0")  # no longer there
    read_ahead.AHEAD.begin(file, "w1")  # now far from the start
    assert [start for start, _ in asked][1:] == [read_header(file, file)["w1"].start]


@pytest.mark.parametrize("name", ["model.bin", "model.pth"])
def test_other_files_are_left_alone(name, tmp_path, asked):
    read_ahead.AHEAD.begin(str(tmp_path / name), "w")
    read_ahead.AHEAD.begin(str(tmp_path / name), "unknown")
    assert asked == []


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_merges_read_ahead(granularity, family, merge, monkeypatch):
    begun = []
    monkeypatch.setattr(read_ahead._ReadAhead, "begin", lambda self, *place: begun.append(place))
    merge(merge_config(family, parameters={"granularity": granularity}))
    files = {f"{path}/model.safetensors" for path in family.values()}
    tensors = set(load_file(f"{family['base']}/model.safetensors"))
    assert set(begun) == {(file, tensor) for file in files for tensor in tensors}
