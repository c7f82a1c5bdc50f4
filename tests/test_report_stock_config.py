"""Stock configs with explicit weights, merged by MergeKit alone."""

import shutil
from itertools import cycle

import pytest
import torch
import transformers
import yaml
from conftest import llama_config, merge_config, save_family, save_tokenizer, slices_config
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions

from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.planning.config import ConfigFile
from mergekit_metagpt.planning.forecast import forecast
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.report.stock_config import stock_config

DETERMINISTIC = [
    m.spec.name
    for m in registered_methods()
    if isinstance(m, MetaGPTMerge) and not m.is_plain and not m.is_random
]


def resolved(config) -> str:
    parsed = ConfigFile("metagpt.yml", "", config).parse()
    return stock_config(forecast(parsed, MergeOptions(), progress=False))


def assert_same(merge, config, steps: int = 0) -> None:
    """Compare a merge with that of its stock config: the same bytes, or up to rounding steps."""
    ours, stock = merge(config), merge(yaml.safe_load(resolved(config)))
    assert ours.keys() == stock.keys()
    for name, tensor in ours.items():
        # Of the largest value: where terms cancel, steps are as large as those of the terms.
        step = torch.finfo(tensor.dtype).eps * tensor.abs().max().item()
        torch.testing.assert_close(tensor, stock[name], rtol=0, atol=steps * step)


@pytest.mark.parametrize(
    ("method", "granularity"), zip(DETERMINISTIC, cycle(["tensor", "layer", "model"]), strict=False)
)
def test_sparsified_methods_give_the_same_bytes(method, granularity, tmp_path, merge):
    paths = save_family(tmp_path, llama_config(), (0.01, 0.03, 0.02))  # a sum of 3 has an order
    parameters = {"density": 0.6, "lambda": 0.9, "granularity": granularity}
    config = merge_config(paths, method, parameters=parameters)
    config["models"].reverse()
    config["models"].append({"model": paths["base"]})
    assert_same(merge, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_for_16_bit_checkpoints_the_yaml_asks_for_float32(dtype, tmp_path, merge):
    paths = save_family(tmp_path, llama_config(), dtype=dtype)
    assert_same(merge, merge_config(paths, "metagpt_ties"))  # of equal numbers, all are kept
    assert_same(merge, merge_config(paths), steps=2)


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_slices_modules_and_priors_are_kept(granularity, family, merge):
    parameters = {"granularity": granularity, "density": [0.3, 0.9]}
    priors = {"weight": [{"filter": "mlp", "value": [0.5, 2.0]}, {"value": 1.0}]}
    sliced = slices_config(family, [[0, 2]], [[2, 3]], parameters=parameters)
    sliced["merge_method"] = "metagpt_ties"
    sliced["slices"][0]["sources"][1]["parameters"] = priors
    assert_same(merge, sliced)
    whole = merge_config(family, "metagpt_ties", parameters=parameters)
    whole["models"][1]["parameters"] = {**priors, "exponent": 1.0}
    whole["modules"] = {"default": {"models": whole.pop("models"), "parameters": {"weight": 2.0}}}
    assert_same(merge, whole)


def test_layers_take_their_weights_along_and_ten_and_more_are_not_confused(family, merge, tmp_path):
    moving = slices_config(family, [[0, 1]], [[2, 3]], [[1, 3], [0, 2]])
    assert_same(merge, {**moving, "merge_method": "metagpt_ties"})
    paths = save_family(tmp_path, llama_config(num_hidden_layers=12, hidden_size=16))
    for own in ("tensor", "layer"):
        assert_same(merge, merge_config(paths, "metagpt_ties", parameters={"granularity": own}))


def test_a_model_has_one_number_and_a_layer_one_filter(family):
    model, layer = (
        yaml.safe_load(resolved(merge_config(family, parameters={"granularity": granularity})))
        for granularity in ("model", "layer")
    )
    assert model["merge_method"] == "task_arithmetic"
    assert sum(it["parameters"]["weight"] for it in model["models"]) == pytest.approx(1)
    assert "granularity" not in model["parameters"]
    filters = [w["filter"] for w in layer["models"][0]["parameters"]["weight"]]
    assert {f"model.layers.{n}." for n in range(3)} < set(filters)
    assert len(filters) == 6


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("base first second", "base"),
        (" second first", "second"),
        ("base first first", "first"),
        ("base base base", None),
        (" first ", None),
    ],
)
def test_the_chat_template_is_that_of_our_merge(given, written, own):
    """Of equally frequent ones MergeKit takes any, so it is written out where models differ."""
    template = "{{{{ messages }}}} of the {}".format
    for path, name in zip(own.values(), given.split(" "), strict=True):
        save_tokenizer(path, "the", "cat")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = template(name) if name else None
        tokenizer.save_pretrained(path)
    stock = yaml.safe_load(resolved(merge_config(own, chat_template="auto")))
    assert stock["chat_template"] == (template(written) if written else "auto")


def test_comments_say_where_the_numbers_come_from(family):
    text = resolved(merge_config(family, "metagpt_dare_linear", parameters={"density": 0.5}))
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "arxiv.org/abs/2406.11385" in comments
    assert f"Base: {family['base']}" in comments
    assert f"{family['a']}: norm " in comments
    assert "different masks" in comments
    assert "Of equal magnitudes" in resolved(merge_config(family, "metagpt_ties"))


WRITTEN = [
    {"parameters": {"exponent": 1.5, "normalize": True, "lambda": 0.7}},
    {"parameters": {"densitty": 0.4, "granularity": "layer", "exponent": 1}},
    {"models": {"lambda": 0.3, "granularity": "model", "weight": [0.5, 1.0], "densitty": 1}},
    {"base": {"weight": 2.0, "density": 0.5}},
    {"equal": ["a"], "parameters": {"exponent": 0}},
    {"equal": ["a", "b"]},
    {"equal": ["a", "b"], "parameters": {"granularity": "model", "exponent": 0}},
]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *(("metagpt", changes) for changes in WRITTEN),
        *zip(cycle(["metagpt_ties", "metagpt_breadcrumbs"]), WRITTEN, strict=False),
    ],
    ids=str,
)
def test_what_is_written_passes_the_check_and_merges_to_the_same(
    method, changes, family, merge, tmp_path
):
    equal = changes.get("equal", [])
    paths = {n: shutil.copytree(family["base"] if n in equal else p, tmp_path / n)
             for n, p in family.items()}  # fmt: skip
    config = merge_config({n: str(p) for n, p in paths.items()}, method)
    config["parameters"] = {**changes.get("parameters", {})}
    config["models"][0]["parameters"] = {**changes.get("models", {})}
    if "base" in changes:
        base = {"model": config["base_model"], "parameters": changes["base"]}
        config["models"].insert(0, base)
    text = resolved(config)
    inspect(ConfigFile("stock.yml", text, yaml.safe_load(text)))
    assert_same(merge, config, steps=2)
