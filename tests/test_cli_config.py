"""What the commands make of CONFIG and of MergeKit's options, whichever command it is."""

import os
import threading

import pytest
import torch
from conftest import (
    invoke,
    invoke_merge,
    merge_config,
    on_posix,
    problems_of,
    slices_config,
    write_yaml,
)

import mergekit_metagpt


def test_standard_input_is_a_config(config, tmp_path):
    text = config.read_text()
    invoke_merge("-", tmp_path / "out", input=text)
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text


@on_posix
@pytest.mark.parametrize("name", ["check", "coefficients", "merge"])
def test_a_pipe_is_a_config(name, config, tmp_path):
    """It can be read once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(config.read_text(),), daemon=True)
    writer.start()
    invoke(name, pipe, *([tmp_path / "out", "--no-copy-tokenizer"] if name == "merge" else []))
    writer.join()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([[0, 1], [0, 2], [0, 1]], "must contain the same number of layers); correct that."),
        ([[0, 9]], "correct its layer_range"),
    ],
)
def test_bad_slices_are_explained_as_check_does(layers, sentence, family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", slices_config(family, layers))
    assert sentence in invoke("check", yml, status=1).stderr
    assert sentence in invoke("coefficients", yml, status=1).stderr


def test_a_setting_that_is_ignored_does_not_hide_why_nothing_can_be_planned(family, tmp_path):
    config = slices_config(family, [[0, 1], [0, 2], [0, 1]])
    config["slices"][0]["sources"][0]["parameters"] = {"weight": 2.0}  # of the base
    reasons = problems_of(config, tmp_path)
    assert len(reasons) == 2
    assert "must contain the same number of layers" in reasons[1]
    with pytest.raises(ValueError, match="must contain the same number of layers"):
        mergekit_metagpt.plan(config)


@pytest.mark.parametrize("name", ["coefficients", "resolve"])
def test_what_mergekit_ignores_is_a_warning(name, family, tmp_path):
    config = merge_config(family, parameters={"granularty": "model"}, anchors={"a": 1})
    done = invoke(name, write_yaml(tmp_path / "metagpt.yml", config))
    assert "Warning: " in done.stderr
    assert "write granularity instead" in done.stderr
    assert "unknown key anchors" in done.stderr


def test_threads_and_verbosity_are_honoured(tmp_path, monkeypatch):
    levels, threads = [], []
    monkeypatch.setattr("logging.basicConfig", lambda level: levels.append(level))
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr("torch.set_num_interop_threads", lambda number: None)
    config = write_yaml(tmp_path / "metagpt.yml", merge_config({"base": "no", "a": "none"}))
    invoke("coefficients", config, "--num-threads", 3, "-v", status=1)
    assert (levels, threads[0], torch.get_num_threads()) == ([20], 3, 1)


@pytest.mark.parametrize(
    ("option", "values", "said"),
    [
        ("--out-shard-size", ["foo", "", "5X", "B"], "write one such as 5B, 500M or 100K."),
        ("--num-threads", [0, -1], "is not in the range x>=1."),
        ("--write-threads", [0], "is not in the range x>=1."),
        ("--random-seed", [-1, 1 << 32], "is not in the range 0<=x<=4294967295."),
    ],
)
def test_a_value_that_an_option_cannot_have_is_wrong_usage(option, values, said, config):
    for value in values:
        *_, line = invoke("check", config, option, value, status=2).stderr.splitlines()
        assert line.startswith(f"Error: Invalid value for '{option}'")
        assert str(value) in line
        assert line.endswith(said)


@pytest.mark.parametrize("device", ["cuda", "gpu:1"])
def test_a_device_that_is_not_there_is_one_sentence(device, config):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    (line,) = invoke("check", config, "--device", device, status=1).stderr.splitlines()
    assert f"no {device} device here; use --device cpu." in line
