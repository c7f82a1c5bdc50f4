"""Help, completion and suggestions; what is printed, on any terminal; and how commands fail."""

import re
import sys
from unittest.mock import Mock

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from conftest import invoke, llama_config, merge_config, save_family, write_yaml

from mergekit_metagpt.cli import main


@pytest.mark.parametrize("name", main.list_commands(click.Context(main))[:-1])
def test_help_shows_an_example_and_mergekits_options_in_a_group_of_their_own(name):
    said = CliRunner().invoke(main, [name, "--help"]).stdout
    listed = main.get_command(click.Context(main), name).help
    assert listed in " ".join(said.split())
    assert f"mergekit-metagpt {name}" in said.partition("Example:")[2]
    own, theirs = said.split("\nDangerous Options:\n")  # the first of MergeKit's groups
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
        (["check", "--devise", "x"], "--device"),
        (["compare", "--exponents", "1"], "--exponent"),
    ],
)
def test_what_is_misspelt_gets_a_suggestion(words, said):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert said in re.sub("[:.?']", "", done.stderr)  # click's versions differ in these


def test_models_are_printed_as_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = save_family(tmp_path / "m", llama_config(), scales=(0.01,))
    (tmp_path / "m" / "a").rename(tmp_path / "m" / "[bold]a:smile:[")
    (tmp_path / "m" / "[").mkdir()
    (tmp_path / "m" / "base").rename(tmp_path / "m" / "[" / "x]")
    paths = {"base": "m/[/x]", "a": "m/[bold]a:smile:["}
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    shown = invoke("coefficients", config).stdout
    assert "[bold]a:smile:[" in shown
    assert "m/[/x]" in shown


def test_an_output_that_is_not_unicode_is_no_reason_to_fail(config):
    for words, shown in (
        (["coefficients", str(config)], b"granularity tensor"),
        (["diagnose", "--help"], b"Linearity"),
    ):
        done = CliRunner(charset="ascii").invoke(main, words)
        assert done.exit_code == 0, done.output
        assert shown in done.stdout_bytes


def test_a_command_that_cannot_be_imported_is_one_sentence(monkeypatch):
    """As with another version of MergeKit, whose private names differ."""
    monkeypatch.setitem(sys.modules, "mergekit_metagpt.cli.resolve", None)
    (line,) = invoke("resolve", "metagpt.yml", status=1).stderr.splitlines()
    assert line.startswith("Error: import of mergekit_metagpt.cli.resolve halted")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError(60), "KeyError: 60"),
        (MemoryError(), "MemoryError"),
        (ValueError("Not ours, but a whole sentence."), "ValueError: Not ours, but a whole"),
        (RuntimeError("size mismatch\n" * 999), "RuntimeError: size mismatch size mismatch"),
        (PermissionError(13, "Permission denied", "/file"), "Permission denied: /file"),
    ],
)
def test_an_unforeseen_failure_is_one_sentence(error, said, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.preflight.inspect", Mock(side_effect=error))
    (line,) = invoke("check", "merge.yml", status=1).stderr.splitlines()
    assert line.startswith(f"Error: main check failed ({said}")
    end = "/mergekit-metagpt/issues." if not isinstance(error, OSError) else "and run it again."
    assert line.endswith(end)
    assert len(line) < 1000
    assert invoke("check", "merge.yml", "--verbose", status=1).exception is error
