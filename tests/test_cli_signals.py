"""Every command that is stopped ends in one line, and leaves nothing behind."""

import os
import signal
from pathlib import Path

import click
import pytest
from conftest import invoke, merge_config, on_posix, write_yaml

import mergekit_metagpt.api.functions  # noqa: F401  # before what it imports is replaced
from mergekit_metagpt import preflight
from mergekit_metagpt.cli import main
from mergekit_metagpt.demo import models
from mergekit_metagpt.diagnosis import linearity
from mergekit_metagpt.evaluation.harness import Bench
from mergekit_metagpt.measure.checkpoints import Checkpoints

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
ARGUMENTS = {
    "survey": "{base} {expert} --quiet",
    "coefficients": "{config} --quiet",
    "compare": "{config} --quiet",
    "check": "{config} --quiet",
    "diagnose": "{config} --quiet",
    "resolve": "{config} -o stock.yml --quiet",
    "merge": "{config} merged --quiet",
    "evaluate": "{config} {base} --tasks x --quiet",
    "demo": "",
}


@on_posix
@pytest.mark.parametrize("command", main.list_commands(click.Context(main)))
def test_a_stopped_command_ends_in_one_line_and_leaves_nothing(
    command, family, tmp_path, monkeypatch
):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    words = ARGUMENTS[command].format(config=config, base=family["base"], expert=family["a"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    number = 0

    def stop(*_, **__):
        """Stop the command where it has begun to work."""
        if command == "demo":
            Path("metagpt-demo/base").mkdir()
        os.kill(os.getpid(), number)
        raise AssertionError("still running")

    for owner, name in (
        (preflight, "inspect"),
        (linearity, "token_ids"),
        (models, "train_family"),
        (Checkpoints, "__init__"),
        (Bench, "_scores"),
    ):
        monkeypatch.setattr(owner, name, stop)
    for name in SIGNALS:
        number = signal.Signals[name]
        # The tests may have been started with nohup, or in the background.
        before = signal.signal(number, signal.default_int_handler)
        try:
            done = invoke(command, *words.split(), status=1)
            assert signal.getsignal(number) is signal.default_int_handler
        finally:
            signal.signal(number, before)
        assert done.stderr == f"Error: This command was stopped by {name}.\n"
        assert os.listdir() == []
