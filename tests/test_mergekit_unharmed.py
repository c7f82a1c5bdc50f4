"""What MergeKit does without this package, it does with it."""

import sys
from concurrent.futures import ThreadPoolExecutor

from conftest import run

# Merges by every stock method into a directory each. The seed is set once: a method of this
# package in between must take nothing from the stream that the stock methods draw from.
MERGE_ALL = """
import sys
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions

base, a, b, out = sys.argv[1:]
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
VALUES = {"t": 0.3, "density": 0.6, "weight": 0.4, "select_topk": 0.7}

def config(method):
    contract, needs_base = method.spec.contract, method.spec.contract.base is BasePolicy.REQUIRED
    models = [base, a, b] if needs_base else [a, b]
    return {
        "merge_method": method.spec.name,
        "models": [{"model": model} for model in models[: contract.max_inputs]],
        "base_model": base if needs_base else None,
        "parameters": {p.name: VALUES[p.name] for p in method.spec.parameters if p.name in VALUES},
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
