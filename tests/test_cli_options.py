"""MergeKit's options in help and completion, and suggestions for what is misspelt."""

import re

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from mergekit_metagpt.cli import main

TAKE_THEM = ["survey", "coefficients", "compare", "check", "diagnose", "resolve", "merge"]


@pytest.mark.parametrize("name", TAKE_THEM)
def test_help_shows_them_in_a_group_of_their_own(name):
    said = CliRunner().invoke(main, [name, "--help"]).stdout
    own, theirs = said.split("MergeKit's options:")
    assert "\nOptions:\n" in own
    assert "--verbose" in own
    assert "--lora-merge-cache" in theirs
    assert "--out-shard-size SIZE" in theirs
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", said, flags=re.MULTILINE)
    assert len(options) == len(set(options)) > 20


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("me", "merge"),
        ("coefficients --gran", "--granularity"),
        ("coefficients --dev", "--device"),
        ("merge metagpt.yml out --random", "--random-seed"),
    ],
)
def test_a_shell_completes_commands_and_all_options(words, completed):
    *before, last = words.split()
    shell = ShellComplete(main, {}, "mergekit-metagpt", "_MERGEKIT_METAGPT_COMPLETE")
    assert [found.value for found in shell.get_completions(before, last)] == [completed]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merg"], "No such command merg Did you mean merge"),
        (["coeficients", "x"], "No such command coeficients Did you mean coefficients"),
        (["xyz"], "No such command xyz"),
        (["check", "--devise", "x"], "--device"),
        (["compare", "--exponents", "1"], "--exponent"),
        (["check", "--nonsense"], "No such option --nonsense"),
    ],
)
def test_what_is_misspelt_gets_a_suggestion(words, said):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert said in re.sub("[:.?']", "", done.stderr)  # click's versions differ in these
