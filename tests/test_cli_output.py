"""What is printed: names of models as they are, on any terminal."""

import pytest
from click.testing import CliRunner
from conftest import llama_config, merge_config, save_family, write_yaml

from mergekit_metagpt.cli import main


@pytest.mark.parametrize("command", ["check", "coefficients", "diagnose"])
def test_models_are_printed_as_they_are_called(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = save_family(tmp_path / "m", llama_config(), scales=(0.01,))
    (tmp_path / "m" / "a").rename(tmp_path / "m" / "[bold]a:smile:[")
    (tmp_path / "m" / "[").mkdir()
    (tmp_path / "m" / "base").rename(tmp_path / "m" / "[" / "x]")
    paths = {"base": "m/[/x]", "a": "m/[bold]a:smile:["}
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    done = CliRunner().invoke(main, [command, str(config)])
    assert done.exit_code == 0, done.output
    assert "[bold]a:smile:[" in done.stdout
    if command != "diagnose":  # which does not name the base
        assert "m/[/x]" in done.stdout


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("check", "Bytes read"),
        ("coefficients", "granularity tensor"),
        ("resolve", "merge_method: task_arithmetic"),
        ("diagnose", "movement, logits"),
    ],
)
def test_an_output_that_is_not_unicode_is_no_reason_to_fail(
    command, shown, charset, family, tmp_path
):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    done = CliRunner(charset=charset).invoke(main, [command, str(config)])
    assert done.exit_code == 0, done.output
    assert shown in done.stdout_bytes.decode("utf-8", "replace")


def test_help_is_printed_in_ascii_too():
    done = CliRunner(charset="ascii").invoke(main, ["diagnose", "--help"])
    assert done.exit_code == 0
    assert "Linearity" in done.stdout_bytes.decode("utf-8")
