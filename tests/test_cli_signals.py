"""Every command that is stopped ends in one line, and leaves nothing behind."""

import sys

import click
from conftest import merge_config, on_posix, run, write_yaml

from mergekit_metagpt.cli import main

# The commands are stopped where they have begun to work, and begin again to be stopped anew.
STOPPED = """
import os, signal, sys
from pathlib import Path
from click.testing import CliRunner
import mergekit_metagpt.api.calls  # before what it imports is replaced
import mergekit_metagpt.preflight as preflight
from mergekit_metagpt.cli import main
from mergekit_metagpt.demo import models
from mergekit_metagpt.diagnosis import linearity
from mergekit_metagpt.evaluation.bench import Bench
from mergekit_metagpt.measure.checkpoints import Checkpoints

config, base, expert, here = sys.argv[1:]
os.chdir(here)

def stop(*_, **__):
    if words == ["demo"]:
        Path("metagpt-demo/base").mkdir()
    os.kill(os.getpid(), number)
    raise AssertionError("still running")

preflight.inspect = linearity.measure_linearity = models.train_family = stop
Checkpoints.__init__ = Bench.missing = stop
# The tests may have been started with nohup, or in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
for words in (
    ["survey", base, expert],
    ["coefficients", config],
    ["compare", config],
    ["check", config],
    ["diagnose", config],
    ["resolve", config, "-o", "stock.yml"],
    ["merge", config, "merged"],
    ["evaluate", config, base, "--tasks", "x"],
    ["demo"],
):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        done = CliRunner().invoke(main, [*words, "--quiet"] if words != ["demo"] else words)
        print(words[0], done.exit_code, done.stderr.strip(), os.listdir())
        assert signal.getsignal(number) == before
"""


@on_posix
def test_a_stopped_command_ends_in_one_line_and_leaves_nothing(family, tmp_path):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    (tmp_path / "here").mkdir()
    base, expert, *_ = family.values()
    done = run(sys.executable, "-c", STOPPED, config, base, expert, tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{command} 1 Error: This command was stopped by {signal}. []"
        for command in main.list_commands(click.Context(main))
        for signal in ("SIGINT", "SIGTERM", "SIGHUP")
    ]
