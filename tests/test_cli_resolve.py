"""What ``mergekit-metagpt resolve`` writes, and where to."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import command, invoke, merge_config, names, on_posix, read, run, write_yaml


@pytest.fixture
def resolve(family, tmp_path):
    config = merge_config(family, parameters={"granularity": "model"})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    return lambda *words: invoke("resolve", yml, *words, "--quiet").stdout


def test_stock_mergekit_merges_it_to_the_same_bytes_without_this_package(family, merge, tmp_path):
    config = merge_config(family, "metagpt_ties", parameters={"density": 0.5})
    stock = tmp_path / "stock.yml"
    invoke("resolve", write_yaml(tmp_path / "metagpt.yml", config), "-o", stock)
    done = run(command("mergekit-yaml"), stock, tmp_path / "out", MERGEKIT_METAGPT_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    ours, theirs = merge(config), read(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_file_is_replaced_as_a_whole(resolve, tmp_path):
    file = tmp_path / "stock.yml"
    expected = resolve()
    assert resolve("-o", file) == ""
    before = file.stat().st_ino
    with file.open() as reader:
        resolve("-o", file)
        assert reader.read() == file.read_text() == expected
    assert file.stat().st_ino != before


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [("resolve", "-o", "stock.yml"), ("coefficients", "--plot", "figure.png")],
)
def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(
    command, option, name, config, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / name
    file.write_text("mine")
    before = names(tmp_path)
    monkeypatch.setattr(Path, "replace", full)
    said = invoke(command, config, option, file, status=1).stderr
    assert f"(No space left on device: {file})" in said
    assert names(tmp_path) == before
    assert file.read_text() == "mine"


@on_posix
def test_a_pipe_and_a_link_stay_what_they_are(resolve, tmp_path):
    """As /dev/null and /dev/stdout do, which would be replaced too where root runs this."""
    fifo, link, file = tmp_path / "fifo", tmp_path / "link", tmp_path / "else" / "stock.yml"
    os.mkfifo(fifo)
    file.parent.mkdir()
    link.symlink_to(file)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    resolve("-o", fifo)
    resolve("-o", link)
    assert os.read(reader, 1 << 16).decode() == file.read_text() == resolve()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()
    os.close(reader)
