"""Weight files in torch's format hold pickles, which may ask for any function to be called."""

import os
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, merge_config, save_family, write_yaml
from mergekit.scripts import run_yaml

from mergekit_metagpt.cli import main

ROOT = Path(__file__).parents[1]


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path):
        self._directory = str(directory)

    def __reduce__(self):
        return os.mkdir, (self._directory,)


@pytest.fixture(scope="module")
def malicious(tmp_path_factory):
    """The config of a merge, and the directory that its expert asks for."""
    folder = tmp_path_factory.mktemp("malicious")
    paths = save_family(folder, llama_config(num_hidden_layers=1), scales=(0.01,))
    Path(paths["a"], "model.safetensors").unlink()
    weights = Path(paths["a"], "pytorch_model.bin")
    torch.save({"lm_head.weight": Malicious(folder / "done")}, weights)
    torch.load(weights, weights_only=False)
    (folder / "done").rmdir()
    return write_yaml(folder / "merge.yml", merge_config(paths)), folder / "done"


@pytest.mark.parametrize(
    "command", ["check", "coefficients", "resolve", "diagnose", "merge", "mergekit-yaml"]
)
def test_what_a_weight_file_asks_for_is_never_done(command, malicious, tmp_path):
    words = [str(malicious[0]), *([str(tmp_path / "out")] if "merge" in command else [])]
    program, words = (run_yaml.main, words) if "-" in command else (main, [command, *words])
    for option in ([], ["--lazy-unpickle"]):
        assert CliRunner().invoke(program, [*words, *option]).exit_code == 1
        assert not malicious[1].exists()


def test_no_torch_is_allowed_that_does_it_and_the_lowest_is_tested():
    (lowest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert [int(number) for number in lowest.split(".")] >= [2, 6]
    workflow = (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
    assert f'LOWEST_TORCH: "{lowest}.0"' in workflow
