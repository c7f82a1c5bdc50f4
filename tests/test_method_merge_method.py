"""The merge methods, called through MergeKit's own functions in one process."""

import logging
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import llama_config, merge_config, read, save_family
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors, registered_methods
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

from mergekit_metagpt.method.merge_method import MetaGPTMerge, register
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.session import SESSION

STOCK = [m for m in registered_methods() if isinstance(m, GeneralizedTaskArithmeticMerge)]
OURS = [m for m in registered_methods() if isinstance(m, MetaGPTMerge)]
SPARSIFIED = [m for m in OURS if not m.is_plain]
RANDOM = [m for m in OURS if m.stock.spec.name.startswith(("dare", "della"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["tensor", "layer", "model"]


def name_of(method):
    return method.spec.name


def state_dicts(dtype=torch.float32, seed=0, scales=(0.1, 0.3)):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (11, 6),
        "layers.0.w": (6, 7),
        "layers.0.b": (7,),
        "layers.1.w": (6, 7),
        "layers.1.b": (7,),
    }
    base = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    experts = {
        f"expert-{number}": {
            n: (t + scale * (1 + i) * torch.randn(t.shape, generator=generator)).to(dtype)
            for i, (n, t) in enumerate(base.items())
        }
        for number, scale in enumerate(scales)
    }
    return base, experts


def parameters_for(method, **changes):
    """Return settings with which every step of the stock method has an effect."""
    names = {parameter.name for parameter in method.spec.parameters}
    chosen = {"density": 0.5, "gamma": 0.1, "epsilon": 0.2, **changes}
    return {name: value for name, value in chosen.items() if name in names}


def test_every_task_vector_method_has_a_counterpart():
    assert len(STOCK) == len(OURS) >= 8
    names = {
        "metagpt" if s.spec.name == "task_arithmetic" else f"metagpt_{s.spec.name}" for s in STOCK
    }
    assert {m.spec.name for m in OURS} == names


def test_registering_again_changes_nothing():
    before = registered_methods()
    register()
    assert registered_methods() == before


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_specs_keep_the_stock_parameters_and_link_the_paper(method):
    ours = {p.name: p for p in method.spec.parameters}
    for parameter in method.stock.spec.parameters:
        assert ours[parameter.name].scope == parameter.scope
        if not parameter.required:
            assert ours[parameter.name].default == parameter.default
    assert ours["weight"].default == 1
    assert method.spec.pretty_name.startswith("MetaGPT")
    assert method.spec.reference_url == "https://arxiv.org/abs/2406.11385"


@pytest.mark.parametrize("method", STOCK, ids=name_of)
def test_a_config_for_a_stock_method_runs_when_only_the_name_is_changed(method, family, merge):
    ours = "metagpt" if method.spec.name == "task_arithmetic" else f"metagpt_{method.spec.name}"
    config = merge_config(family, method.spec.name, parameters={"normalize": True, "lambda": 0.9})
    for model in config["models"]:
        model["parameters"] = {"weight": 0.5, **parameters_for(method)}
    stock = merge(config)
    renamed = merge({**config, "merge_method": ours})
    assert renamed.keys() == stock.keys()
    assert all(tensor.isfinite().all() for tensor in renamed.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_checkpoints_merge_as_the_float64_reference(dtype, granularity, merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.03, 0.02), dtype=dtype)
    merged = merge(merge_config(paths, parameters={"granularity": granularity}))
    base, *experts = map(read, paths.values())
    expected = reference.coefficients(base, experts, granularity)
    reference.assert_merged(merged, base, experts, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_state_dicts_merge_as_the_float64_reference(dtype, granularity):
    base, experts = state_dicts(dtype)
    merged = merge_state_dicts(
        {"base": base, **experts}, "metagpt", base="base", parameters={"granularity": granularity}
    )
    expected = reference.coefficients(base, list(experts.values()), granularity)
    reference.assert_merged(merged, base, list(experts.values()), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_coefficients_are_right_to_a_millionth(granularity):
    """With a base of zeros and experts on different axes, the merge shows the coefficients."""
    generator = np.random.default_rng(0)
    scales = generator.uniform(0.1, 2, size=(3, 5))
    base = {f"layers.{n % 2}.w{n}": torch.zeros(3) for n in range(5)}
    experts = [
        {name: torch.eye(3)[t] * float(scales[t, n]) for n, name in enumerate(base)}
        for t in range(3)
    ]
    merged = merge_state_dicts(
        [base, *experts], "metagpt", base=0, parameters={"granularity": granularity}
    )
    expected = reference.coefficients(base, experts, granularity)
    for n, name in enumerate(base):
        visible = merged[name].double().numpy() / np.float32(scales[:, n])
        assert visible == pytest.approx(expected[name], rel=1e-6)


@given(
    seed=st.integers(0, 1000),
    exponent=st.floats(0, 4),
    priors=st.lists(st.floats(0.1, 10), min_size=2, max_size=2),
    scale=st.floats(-1, 2),
    granularity=st.sampled_from(GRANULARITIES),
)
@settings(max_examples=40, deadline=None)
def test_priors_exponent_and_lambda_follow_the_formula(seed, exponent, priors, scale, granularity):
    base, experts = state_dicts(seed=seed)
    merged = merge_state_dicts(
        {"base": base, **experts},
        "metagpt",
        base="base",
        parameters={
            "granularity": granularity,
            "weight": priors,
            "exponent": exponent,
            "lambda": scale,
        },
    )
    others = list(experts.values())
    expected = reference.coefficients(base, others, granularity, priors, exponent)
    reference.assert_merged(merged, base, others, expected, scale)


def test_priors_take_mergekits_gradients_and_filters(family, merge):
    config = merge_config(family, parameters={"granularity": "model"})
    config["models"][0]["parameters"] = {"weight": [0.0, 2.0]}
    config["models"][1]["parameters"] = {
        "weight": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    }
    merged = merge(config)
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    by_tensor = {}
    for name in base:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        # Tensors outside the layers take the gradient's first value.
        priors = [layer if layer is not None else 0.0, 0.5 if "mlp" in name else 1.0]
        by_tensor[name] = priors * norms / (priors * norms).sum()
    reference.assert_merged(merged, base, experts, by_tensor)


@pytest.mark.parametrize("method", SPARSIFIED, ids=name_of)
@pytest.mark.parametrize("normalize", [False, True])
def test_sparsified_variants_are_the_stock_methods_with_the_coefficients_as_weights(
    method, normalize
):
    base, experts = state_dicts()
    parameters = parameters_for(method, normalize=normalize, rescale=True)
    expected = reference.coefficients(base, list(experts.values()))
    for tensor in base:
        inputs = [base[tensor], *(e[tensor] for e in experts.values())]
        options = {"base_index": 0, "name": tensor, "ids": ["base", *experts]}
        with SESSION.journal() as entries:
            ours = merge_tensors(inputs, method, parameters=parameters, **options)
        weights = dict(zip(experts, entries[0].coefficients, strict=True))
        assert [weights[name] for name in experts] == pytest.approx(expected[tensor], rel=1e-6)
        with own_stream(base[tensor].device, f"{method.stock.spec.name}/{tensor}"):
            theirs = merge_tensors(
                inputs, method.stock, parameters={**parameters, "weight": weights}, **options
            )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", SPARSIFIED, ids=name_of)
def test_sparsified_variants_round_once(method, dtype):
    base, experts = state_dicts(dtype)
    models = {"base": base, **experts}
    parameters = parameters_for(method)
    narrow = merge_state_dicts(models, method, base="base", parameters=parameters)
    wide = merge_state_dicts(
        models,
        method,
        base="base",
        parameters=parameters,
        dtype=torch.promote_types(dtype, torch.float32),
    )
    assert all(torch.equal(narrow[name], wide[name].to(dtype)) for name in base)


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_the_order_of_the_models_does_not_matter(method, family, merge):
    config = merge_config(family, method.spec.name, parameters=parameters_for(method))
    turned = {**config, "models": config["models"][::-1]}
    first, second = (merge(c, random_seed=7) for c in (config, turned))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", RANDOM, ids=name_of)
def test_the_seed_decides_the_masks(method, family, merge):
    config = merge_config(family, method.spec.name, parameters=parameters_for(method))
    first, again, other = (merge(config, random_seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_the_callers_generator_is_left_as_it_was(method):
    base, experts = state_dicts()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    merge_state_dicts(
        {"base": base, **experts}, method, base="base", parameters=parameters_for(method)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_an_expert_equal_to_the_base_changes_nothing(method, granularity):
    base, experts = state_dicts()
    parameters = {**parameters_for(method), "granularity": granularity}
    plain = merge_state_dicts({"base": base, **experts}, method, base="base", parameters=parameters)
    padded = merge_state_dicts(
        {"base": base, "zero": base, **experts}, method, base="base", parameters=parameters
    )
    if method not in RANDOM:  # an additional expert draws additional random numbers
        assert all(torch.equal(plain[name], padded[name]) for name in base)
    alone = merge_state_dicts(
        {"base": base, "x": base, "y": base}, method, base="base", parameters=parameters
    )
    assert all(torch.equal(alone[name], base[name]) for name in base)


def test_all_experts_equal_to_the_base_give_the_base_bit_for_bit():
    base = torch.tensor([-0.0, 0.0, 1.0, -3.5])
    merged = merge_tensors([base, base.clone(), base.clone()], "metagpt", base_index=0)
    assert torch.equal(merged.view(torch.int32), base.view(torch.int32))
    assert merged.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", ["metagpt", "metagpt_ties"])
def test_a_number_that_is_not_finite_is_reported_with_model_and_tensor(method, granularity, bad):
    for where in ("base", "expert-1"):
        base, experts = state_dicts()
        models = {"base": base, **experts}
        models[where]["layers.1.w"][2, 3] = bad
        with pytest.raises(ValueError, match=rf"layers\.1\.w of model {where} holds NaN or Inf"):
            merge_state_dicts(models, method, base="base", parameters={"granularity": granularity})


def test_a_result_beyond_the_dtype_is_refused():
    base, expert = torch.zeros(3).half(), torch.full((3,), 40000.0).half()
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        merge_tensors([base, expert], "metagpt", base_index=0, parameters={"lambda": 2}, name="w")


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
    ],
)
def test_parameters_out_of_range_stop_the_merge_before_it_writes(
    setting, wanted, family, merge, tmp_path
):
    with pytest.raises(ValueError, match=wanted):
        merge(merge_config(family, "metagpt_ties", parameters=setting))
    assert not list(tmp_path.iterdir())


def test_scalars_and_empty_tensors_merge():
    base = {"scale": torch.tensor(1.0), "nothing": torch.zeros(0, 3)}
    expert = {"scale": torch.tensor(3.0), "nothing": torch.zeros(0, 3)}
    for granularity in GRANULARITIES:
        merged = merge_state_dicts(
            [base, expert], "metagpt", base=0, parameters={"granularity": granularity}
        )
        assert merged["scale"] == 3
        assert merged["nothing"].shape == (0, 3)


def test_tied_tensors_in_memory_count_once():
    def tied(scale):
        weight = torch.full((4, 4), scale)
        return {"embed": weight, "head": weight, "w": torch.full((4,), 3 * scale**2)}

    models = [tied(0.0), tied(1.0), tied(2.0)]
    merged = merge_state_dicts(models, "metagpt", base=0, parameters={"granularity": "model"})
    once = reference.coefficients(
        *((lambda ms: (ms[0], ms[1:]))([{k: m[k] for k in ("embed", "w")} for m in models])),
        "model",
    )["w"]
    assert merged["w"][0].item() == pytest.approx(float(once @ [3.0, 12.0]), rel=1e-6)


def test_modules_keep_their_gradients():
    torch.manual_seed(0)
    base, *experts = (torch.nn.Linear(4, 3) for _ in range(3))
    merged = merge_state_dicts([base, *experts], "metagpt", base=0)
    merged["weight"].sum().backward()
    assert base.weight.grad is not None
    assert experts[0].weight.grad is not None


def test_one_group_may_be_merged_directly():
    base, experts = state_dicts()
    entries = [TensorEntry("base", base["layers.0.w"], is_base=True)]
    entries += [TensorEntry(name, e["layers.0.w"]) for name, e in experts.items()]
    group = TensorGroup(tuple(entries))
    merged = get("metagpt").merge_group(
        group, **{"weight": {"expert-0": 1.0, "expert-1": 1.0}, "lambda": 1.0}
    )
    assert torch.equal(
        merged,
        merge_tensors(
            [e.tensor for e in entries], "metagpt", base_index=0, ids=[e.id for e in entries]
        ),
    )
    assert replace(group, entries=group.entries[:1]).non_base == ()


def test_no_warnings_are_raised(family, merge):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert merge(merge_config(family, "metagpt_ties"))


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_bfloat16_models_merge_to_the_same_bytes_in_float32(granularity, tmp_path, merge):
    paths = save_family(tmp_path, llama_config(), dtype=torch.bfloat16)
    config = merge_config(paths, parameters={"granularity": granularity})
    narrow = merge({**config, "dtype": "bfloat16"})
    wide = merge({**config, "dtype": "float32", "out_dtype": "bfloat16"})
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)


LOGGER = "mergekit_metagpt.method.session"


def test_a_stock_merge_logs_once_what_it_uses(merge, tmp_path, caplog):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1, 0.0))
    caplog.set_level(logging.INFO, logger=LOGGER)
    for _ in range(2):  # two merges in one process, as mergekit-multi makes them
        caplog.clear()
        merge(merge_config(paths, parameters={"granularity": "model"}))
        told = [record for record in caplog.records if record.name == LOGGER]
        assert [record.levelname for record in told] == ["INFO", "WARNING", "WARNING"]
        assert f"{paths['b']} 0.9" in told[0].getMessage()
        assert f"{paths['b']} has 99.0% of the merge" in told[1].getMessage()
        assert f"{paths['c']} is equal to the base" in told[2].getMessage()


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_a_stock_merge_logs_nothing_that_it_cannot_know(granularity, merge, tmp_path, caplog):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.012))
    caplog.set_level(logging.INFO, logger=LOGGER)
    merge(merge_config(paths, parameters={"granularity": granularity}))
    assert [record for record in caplog.records if record.name == LOGGER] == []


def test_a_merge_whose_journal_is_kept_logs_nothing(merge, tmp_path, caplog):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1))
    caplog.set_level(logging.INFO, logger=LOGGER)
    with SESSION.journal() as entries:
        merge(merge_config(paths, parameters={"granularity": "model"}))
    assert entries
    assert [record for record in caplog.records if record.name == LOGGER] == []
