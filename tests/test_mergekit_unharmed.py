"""What MergeKit does without this package, it does with it."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import command, llama_config, merge_config, read, run, save_family

SWITCHED_OFF = {"MERGEKIT_METAGPT_AUTOLOAD": "0"}

# Merges by every stock method into a directory each. The seed is set once: a method of this
# package in between must take nothing from the stream that the stock methods draw from.
MERGE_ALL = """
import sys
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.options import MergeOptions

base, a, b, out = sys.argv[1:]
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
VALUES = {"t": 0.3, "density": 0.6, "weight": 0.4, "select_topk": 0.7}

def config(method):
    contract, needs_base = method.spec.contract, method.spec.contract.base is BasePolicy.REQUIRED
    models = [base, a, b] if needs_base else [a, b]
    settings = {p.name: (p.scope, VALUES[p.name]) for p in method.spec.parameters
                if p.name in VALUES}
    each = {n: v for n, (scope, v) in settings.items() if scope is not ParameterScope.SHARED}
    models = [
        {"model": model, "parameters": {n: v + 0.1 * i for n, v in each.items()}}
        for i, model in enumerate(models[: contract.max_inputs])
    ]
    return {
        "merge_method": method.spec.name, "models": models,
        "base_model": base if needs_base else None,
        "parameters": {n: v for n, (scope, v) in settings.items() if n not in each},
    }

def merge(method, name):
    run_merge(MergeConfiguration.model_validate(config(method)), f"{out}/{name}", OPTIONS)

methods = registered_methods()
stock = [m for m in methods if "metagpt" not in m.spec.name]
own = [m for m in methods if m not in stock]
torch.manual_seed(5)
for number, method in enumerate(stock):
    if own:
        merge(own[number % len(own)], "own")
    merge(method, method.spec.name)
print(len(stock), len(own))
"""


def with_and_without(directory: Path, *words: str) -> tuple[list[Path], list[str]]:
    """Run a command with and without the package, side by side; the last word is its output."""
    environments: dict[str, dict[str, str]] = {"with": {}, "without": SWITCHED_OFF}
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run, *words, directory / name, **environment)
            for name, environment in environments.items()
        ]
    for done in runs:
        assert done.result().returncode == 0, done.result().stderr
    return [directory / name for name in environments], [done.result().stdout for done in runs]


def test_every_stock_method_gives_the_same_bytes_with_and_without_the_package(family, tmp_path):
    words = [sys.executable, "-c", MERGE_ALL, *family.values()]
    (here, there), counts = with_and_without(tmp_path, *words)
    (stock, own), (alone, none) = (map(int, count.split()) for count in counts)
    assert stock == alone >= 20
    assert own > none == 0
    methods = sorted(path.name for path in there.iterdir())
    assert len(methods) == stock
    for method in methods:
        one, other = (out / method / "model.safetensors" for out in (here, there))
        assert one.read_bytes() == other.read_bytes(), method


def scripts():
    """MergeKit's commands, but for the one that needs a GPU server to be imported."""
    points = distribution("mergekit").entry_points.select(group="console_scripts")
    return [point for point in points if point.name != "mergekit-evolve"]


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.name)
def test_every_command_answers_help(script):
    done = CliRunner().invoke(script.load(), ["--help"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Usage: ")
    assert "metagpt" not in done.output


def test_extract_lora_extracts_what_it_does_without_the_package(tmp_path, merge):
    """An expert whose task matrices are of rank 2 is all in its adapter, and merges alike."""
    paths = save_family(tmp_path, llama_config())
    reduce_rank(paths, "a", rank=2)
    words = ["--model", paths["a"], "--base-model", paths["base"], "--max-rank", "2", "--out-path"]
    loras, _ = with_and_without(tmp_path, command("mergekit-extract-lora"), *words)
    here, there = (lora / "adapter_model.safetensors" for lora in loras)
    assert here.read_bytes() == there.read_bytes()
    extracted = f"{paths['base']}+{loras[0]}"
    full = merge(merge_config(paths))
    lora = merge(merge_config({**paths, "a": extracted}), lora_merge_cache=str(tmp_path / "cache"))
    base = read(paths["base"])
    for name, tensor in full.items():
        torch.testing.assert_close(lora[name], tensor, rtol=0, atol=1e-5)
        assert not torch.equal(tensor, base[name])


def reduce_rank(paths: dict[str, str], expert: str, rank: int) -> None:
    """Leave only the leading directions of an expert's task matrices."""
    base = read(paths["base"])
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[expert])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(parameter - base[name], full_matrices=False)
                parameter.copy_(base[name] + u[:, :rank] * s[:rank] @ v[:rank])
    model.save_pretrained(paths[expert])
