"""Summaries of coefficients, and the advice that follows from them."""

import pytest

from mergekit_metagpt.method.advice import warnings
from mergekit_metagpt.method.summary import Entry, Summary


def entry(tensor, norms, *, granularity="tensor", size=1, priors=(1.0, 1.0), exponent=2.0):
    experts = ("a", "b")[: len(norms)]
    return Entry(tensor, granularity, experts, norms, priors[: len(norms)], exponent, size)


def test_means_are_weighted_by_parameters():
    found = Summary([entry("big", (1.0, 3.0), size=3), entry("small", (1.0, 1.0), size=1)])
    assert [expert.mean for expert in found.experts] == [0.3125, 0.6875]
    assert [(expert.least, expert.largest) for expert in found.experts] == [
        (0.25, 0.5),
        (0.5, 0.75),
    ]
    assert found.parameters == 4


def test_one_set_of_coefficients_is_its_own_mean_to_the_last_bit():
    norms = (0.1, 0.2)
    found = Summary([entry(str(n), norms, granularity="model", size=n) for n in range(1, 50)])
    assert tuple(expert.mean for expert in found.experts) == entry("x", norms).coefficients
    assert not found.varies


def test_a_scope_is_measured_once_whatever_its_tensors():
    layers = [entry(f"layers.{n}.{w}", (2.0, 7.0), granularity="layer") for n in "01" for w in "vw"]
    assert [expert.squared_norm for expert in Summary(layers).experts] == [4.0, 14.0]
    assert list(Summary(layers).scopes) == ["layers.0", "layers.1"]


def test_layers_are_in_their_order_and_not_in_that_of_their_names():
    found = Summary([entry(f"layers.{n}.w", (1.0, float(n))) for n in range(12)])
    assert found.layers[10] == list(entry("x", (1.0, 10.0)).coefficients)


def test_nothing_is_merged_by_a_stock_method():
    assert Summary([]).as_json()["experts"] == []
    assert warnings(Summary([])) == []


@pytest.mark.parametrize(("norms", "warned"), [((91.0, 9.0), True), ((90.0, 10.0), False)])
def test_an_expert_dominates_from_90_percent_on(norms, warned):
    assert bool(warnings(Summary([entry("w", norms)]))) == warned


def test_alone_an_expert_dominates_nobody():
    assert warnings(Summary([entry("w", (1.0,))])) == []


@pytest.mark.parametrize(
    ("exponent", "advice"),
    [
        (2.0, "set exponent: 1, which gives 0.9091 / 0.0909, or give it"),
        (1.0, "set exponent: 0, which gives 0.5000 / 0.5000, or give it"),
        (0.0, "; give it a smaller weight"),
    ],
)
def test_advice_names_the_next_smaller_exponent(exponent, advice):
    priors = (1.0, 1.0) if exponent else (99.0, 1.0)
    norms = (100.0, 1.0) if exponent == 2 else (1e4, 1.0)
    (warning,) = warnings(Summary([entry("w", norms, exponent=exponent, priors=priors)]))
    assert advice in warning


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_advice_names_no_exponent_that_changes_nothing(granularity):
    far = Summary([entry("w", (1e20, 1e-20), granularity=granularity)])
    (warning,) = warnings(far)
    assert "set exponent: 0, which gives 0.5000 / 0.5000" in warning
    fixed = Summary([entry("w", (1.0, 1.0), priors=(1e9, 1.0), granularity=granularity)])
    (warning,) = warnings(fixed)
    assert warning.endswith("hardly count; give it a smaller weight (its prior).")


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_nobody_dominates_an_expert_that_is_equal_to_the_base(exponent):
    found = Summary([entry("w", (3.0, 0.0), exponent=exponent)])
    assert warnings(found) == ["b is equal to the base, and gets no share of the merge."]
    assert [expert.mean for expert in found.experts] == [1.0, 0.0]


def test_in_turn_advice_names_no_way_that_leaves_the_same():
    one = [entry("v", (1e20, 1.0), size=9), entry("w", (1.0, 1e9), size=9)]
    (warning,) = warnings(Summary(one))
    assert "granularity: model" not in warning
    assert "set exponent: 0, which leaves 0%" in warning


@pytest.mark.parametrize(("part", "warned"), [(51, True), (50, False)])
def test_experts_that_take_over_in_turn_count_from_half_of_the_parameters(part, warned):
    half = part // 2
    entries = [entry("v", (99.0, 1.0), size=half), entry("w", (1.0, 99.0), size=part - half)]
    found = warnings(Summary([*entries, entry("x", (1.0, 1.0), size=100 - part)]))
    assert bool(found) == warned
    assert not warned or "set granularity: model, which gives 0.5000 / 0.5000" in found[0]


def test_where_priors_vary_nothing_is_said_of_granularity_model():
    entries = [entry("v", (99.0, 1.0)), entry("w", (1.0, 99.0), priors=(1.0, 2.0))]
    (warning,) = warnings(Summary(entries))
    assert "granularity: model" not in warning
    assert "set exponent: 0, which leaves 0%" in warning  # 1 would leave all
