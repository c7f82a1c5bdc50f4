"""The merge methods, called through MergeKit's own functions in one process."""

import logging
import math

import pytest
import torch
from conftest import llama_config, merge_config, read, save_family
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors, registered_methods
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from reference import fine_tunes

from mergekit_metagpt import register
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.parameters import RULES

STOCK = [m for m in registered_methods() if isinstance(m, GeneralizedTaskArithmeticMerge)]
OURS = [m for m in registered_methods() if isinstance(m, MetaGPTMerge)]
RANDOM = [m for m in OURS if m.stock.spec.name.startswith(("dare", "della"))]
each_method = pytest.mark.parametrize("method", OURS, ids=lambda method: method.spec.name)
each_granularity = pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])


def state_dicts():
    shapes = {"embed.weight": (11, 6)}
    shapes |= {f"layers.{n}.{w}": its for n in "01" for w, its in (("w", (6, 7)), ("b", (7,)))}
    base, experts = {}, {"expert-0": {}, "expert-1": {}}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        scales = (0.1 * number, 0.3 * number)
        base[name], tuned = fine_tunes(shape, torch.float32, scales, seed=number)
        for expert, tensor in zip(experts.values(), tuned, strict=True):
            expert[name] = tensor
    return base, experts


def parameters_for(method):
    """Return settings with which every step of the stock method has an effect."""
    chosen = {"density": 0.5, "gamma": 0.1, "epsilon": 0.2}
    return {p.name: chosen[p.name] for p in method.spec.parameters if p.name in chosen}


def test_every_task_vector_method_has_a_counterpart_with_its_parameters():
    assert len(STOCK) == len(OURS) >= 8
    for method in OURS:
        stock, ours = method.stock.spec, {p.name: p for p in method.spec.parameters}
        own = "metagpt" if method.is_plain else f"metagpt_{stock.name}"
        assert method.spec.name == own
        for parameter in stock.parameters:
            assert ours[parameter.name].scope == parameter.scope
            assert parameter.required or ours[parameter.name].default == parameter.default
        assert ours["weight"].default == 1
    assert RULES.keys() <= {parameter.name for its in STOCK for parameter in its.spec.parameters}
    before = registered_methods()
    register()
    assert registered_methods() == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", STOCK, ids=lambda method: method.spec.name)
def test_a_config_for_a_stock_method_runs_when_only_the_name_is_changed(method, family, merge):
    ours = "metagpt" if method.spec.name == "task_arithmetic" else f"metagpt_{method.spec.name}"
    config = merge_config(family, ours, parameters={"normalize": True, "lambda": 0.9})
    for model in config["models"]:
        model["parameters"] = {"weight": 0.5, **parameters_for(method)}
    renamed = merge(config)
    assert renamed.keys() == read(family["base"]).keys()
    assert all(tensor.isfinite().all() for tensor in renamed.values())


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"weight": -0.5}, "weight must be a finite number of at least 0"),
        ({"weight": math.nan}, "weight must be a finite number of at least 0"),
        ({"exponent": -1}, "exponent must be a finite number of at least 0"),
        ({"lambda": math.inf}, "lambda must be a finite number"),
        ({"density": 1.5}, "density must be a number from 0 to 1"),
        ({"density": math.nan}, "density must be a number from 0 to 1"),
        ({"granularity": "layers"}, "granularity must be tensor, layer or model, not 'layers'"),
        ({"granularity": "direction"}, r"not 'direction'.* merge_method: metagpt\."),
    ],
)
def test_parameters_out_of_range_stop_the_merge_before_it_writes(
    setting, wanted, family, merge, tmp_path
):
    with pytest.raises(ValueError, match=wanted):
        merge(merge_config(family, "metagpt_ties", parameters=setting))
    assert not list(tmp_path.iterdir())


@each_granularity
def test_bfloat16_models_merge_to_the_same_bytes_in_float32(granularity, tmp_path, merge):
    paths = save_family(tmp_path, llama_config(), dtype=torch.bfloat16)
    config = merge_config(paths, parameters={"granularity": granularity})
    narrow = merge({**config, "dtype": "bfloat16"})
    wide = merge({**config, "dtype": "float32", "out_dtype": "bfloat16"})
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


@each_method
def test_the_seed_decides_the_masks_and_the_order_of_the_models_nothing(method):
    base, experts = state_dicts()
    models = {"base": base, **experts}

    def merged(models, seed):
        torch.manual_seed(seed)
        return merge_state_dicts(models, method, base="base", parameters=parameters_for(method))

    first, again = merged(models, 7), merged(dict(reversed(models.items())), 7)
    assert all(torch.equal(first[name], again[name]) for name in first)
    if method in RANDOM:
        other = merged(models, 8)
        assert any(not torch.equal(first[name], other[name]) for name in first)


@each_granularity
@each_method
def test_an_expert_equal_to_the_base_changes_nothing(method, granularity):
    base, experts = state_dicts()
    base["layers.0.b"][:2] = torch.tensor([-0.0, 0.0])  # zeros keep their signs
    parameters = {**parameters_for(method), "granularity": granularity}

    def merged(**experts):
        return merge_state_dicts({"b": base, **experts}, method, base="b", parameters=parameters)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    plain, padded = merged(x=experts["expert-0"]), merged(x=experts["expert-0"], zero=base)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    if method not in RANDOM:  # an additional expert draws additional random numbers
        assert all(torch.equal(plain[name], padded[name]) for name in base)
    alone = merged(x=base, y=base)
    for name, tensor in base.items():
        assert torch.equal(alone[name].view(torch.int32), tensor.view(torch.int32))
        assert alone[name].data_ptr() != tensor.data_ptr()


@each_granularity
@pytest.mark.parametrize("where", ["base", "expert-1"])
def test_a_number_that_is_not_finite_is_reported_with_model_and_tensor(where, granularity):
    base, experts = state_dicts()
    models = {"base": base, **experts}
    models[where]["layers.1.w"][2, 3] = math.nan
    with pytest.raises(ValueError, match=rf"layers\.1\.w of model {where} holds NaN or Inf"):
        merge_state_dicts(models, "metagpt", base="base", parameters={"granularity": granularity})


def test_one_group_may_be_merged_directly():
    base, experts = state_dicts()
    tensors = [model["layers.0.w"] for model in (base, *experts.values())]
    ids = ["base", *experts]
    group = TensorGroup.from_tensors(tensors, ids=ids, base_index=0, name=None)
    parameters = {"weight": dict.fromkeys(experts, 1.0), "lambda": 1.0}
    merged = get("metagpt").merge_group(group, **parameters)
    assert torch.equal(merged, merge_tensors(tensors, "metagpt", base_index=0, ids=ids))


def test_a_stock_merge_logs_once_what_it_uses_and_nothing_that_it_cannot_know(
    merge, family, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="mergekit_metagpt")

    def told(paths, granularity, priors=(1.0, 1.0, 1.0), **parameters):
        caplog.clear()
        config = merge_config(paths, parameters={"granularity": granularity, **parameters})
        for number, model in enumerate(config["models"]):
            model["parameters"] = {"weight": priors[number]}
        merge(config)
        records = [it for it in caplog.records if it.name == "mergekit_metagpt.method.notes"]
        return [(record.levelname, record.getMessage()) for record in records]

    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1, 0.0))
    for _ in range(2):  # two merges in one process, as mergekit-multi makes them
        (info, uses), *warned = told(paths, "model")
        assert info == "INFO"
        assert f"{paths['b']} 0.9" in uses
        assert [level for level, _ in warned] == ["WARNING", "WARNING"]
        assert f"{paths['b']} has 99.0% of the merge" in warned[0][1]
        assert f"{paths['c']} is equal to the base" in warned[1][1]
    with noted() as entries:
        assert told(paths, "model") == []
    assert entries
    even = save_family(tmp_path, llama_config(), scales=(0.01, 0.012, 0.011))
    for models, granularity in ((even, "tensor"), (even, "layer"), (family, "direction")):
        assert told(models, granularity) == []
    uneven = save_family(tmp_path, llama_config(), scales=(0.01, 0.2))
    for granularity in ("tensor", "layer"):
        ((_, sentence),) = told(uneven, granularity)
        assert sentence.startswith("In tensors with at least a tenth of the parameters, as in ")
        assert f"{uneven['b']} has 99." in sentence
        assert "set exponent: 1" in sentence
    ((_, sentence),) = told(uneven, "direction", priors=(1e-4, 1.0), exponent=6)
    assert f"% of the task vector of {uneven['a']}; set exponent: 0, or" in sentence
