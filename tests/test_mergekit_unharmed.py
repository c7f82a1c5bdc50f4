"""What MergeKit does without this package, it does with it."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from click.testing import CliRunner
from conftest import llama_config, merge_config, read, run, save_family
from mergekit.scripts import extract_lora

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


def test_every_stock_method_gives_the_same_bytes_with_and_without_the_package(family, tmp_path):
    words = [sys.executable, "-c", MERGE_ALL, *family.values()]
    environments = {"with": {}, "without": {"MERGEKIT_METAGPT_AUTOLOAD": "0"}}
    with ThreadPoolExecutor() as pool:
        done = [pool.submit(run, *words, tmp_path / n, **e) for n, e in environments.items()]
    outputs = [one.result().stdout for one in done]
    assert all(outputs), [one.result().stderr for one in done]
    (stock, own), (alone, none) = (map(int, count.split()) for count in outputs)
    assert stock == alone >= 20
    assert own > none == 0
    methods = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert len(methods) == stock
    for method in methods:
        one, other = (tmp_path / n / method / "model.safetensors" for n in environments)
        assert one.read_bytes() == other.read_bytes(), method


def test_what_extract_lora_extracts_is_all_of_an_expert_of_low_rank_and_merges_alike(
    tmp_path, merge
):
    paths = save_family(tmp_path, llama_config())
    base = read(paths["base"])
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["a"])
    with torch.no_grad():  # leave only two leading directions of its task matrices
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                u, s, v = torch.linalg.svd(parameter - base[name], full_matrices=False)
                parameter.copy_(base[name] + u[:, :2] * s[:2] @ v[:2])
    model.save_pretrained(paths["a"])
    adapter = str(tmp_path / "adapter")
    words = ["--model", paths["a"], "--base-model", paths["base"], "--out-path", adapter]
    done = CliRunner().invoke(extract_lora.main, [*words, "--max-rank", "2"])
    assert done.exit_code == 0, done.output
    extracted = merge_config({**paths, "a": f"{paths['base']}+{adapter}"})
    full = merge(merge_config(paths))
    lora = merge(extracted, lora_merge_cache=str(tmp_path / "cache"))
    for name, tensor in full.items():
        torch.testing.assert_close(lora[name], tensor, rtol=0, atol=1e-5)
        assert not torch.equal(tensor, base[name])
