"""Summaries of coefficients, and the advice that follows from them."""

from dataclasses import replace

import pytest

from mergekit_metagpt.core.directions import Directions
from mergekit_metagpt.method.advice import warnings
from mergekit_metagpt.method.notes import Watch
from mergekit_metagpt.method.summary import Entry, Summary


def entry(tensor, norms, *, granularity="tensor", size=1, priors=(1.0, 1.0), exponent=2.0):
    experts = ("a", "b")[: len(norms)]
    return Entry(tensor, granularity, experts, norms, priors[: len(norms)], exponent, size)


def by_direction(norms=(1.0, 9.0), kept=(1.0, 1.0), length=None, scale=1.0, **changes):
    found = Directions(norms, kept, sum(norms) if length is None else length, scale, 2, 4)
    its = entry("w", norms, granularity="direction", size=4, exponent=0.0)
    return replace(its, **{"directions": found, **changes})


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


SMALL, FAR = by_direction(kept=(0.04, 1.0), exponent=2.0), by_direction(length=40.0)
QUIET = [
    by_direction(length=40.0, scale=2.0, kept=(2.0, 2.0)),  # a large lambda is no stretch
    by_direction(length=0.1, scale=0.1, kept=(0.09, 0.09)),  # nor a small one a small share
    by_direction(kept=(0.0, 1.0), priors=(0.0, 1.0)),  # an expert without a prior
]
IN_TURN = [entry("v", (99.0, 1.0)), entry("w", (1.0, 99.0), priors=(1.0, 2.0))]


def half(part):
    """Two experts that take over in turn, in this part of a hundred parameters."""
    entries = [entry("v", (99.0, 1.0), size=part // 2)]
    entries.append(entry("w", (1.0, 99.0), size=part - part // 2))
    return [*entries, entry("x", (1.0, 1.0), size=100 - part)]


@pytest.mark.parametrize(
    ("entries", "said", "not_said"),
    [
        ([], None, ""),
        ([entry("w", (1.0,))], None, ""),  # alone, an expert dominates nobody
        ([entry("w", (90.0, 10.0))], None, ""),
        ([entry("w", (91.0, 9.0))], "a has 91.0%", ""),
        # Advice names the next smaller exponent,
        ([entry("w", (100.0, 1.0))], "set exponent: 1, which gives 0.9091 / 0.0909, or give", ""),
        (
            [entry("w", (1e4, 1.0), exponent=1.0)],
            "set exponent: 0, which gives 0.5000 / 0.5000, or give it",
            "",
        ),
        (
            [entry("w", (1e4, 1.0), exponent=0.0, priors=(99.0, 1.0))],
            "; give it a smaller weight",
            "exponent",
        ),
        # but none that changes nothing,
        ([entry("w", (1e20, 1e-20))], "set exponent: 0, which gives 0.5000 / 0.5000", ""),
        (
            [entry("w", (1.0, 1.0), priors=(1e9, 1.0), granularity="model")],
            "hardly count; give it a smaller weight (its prior).",
            "exponent",
        ),
        # and no way that leaves the same to those that take over in turn.
        (
            [entry("v", (1e20, 1.0), size=9), entry("w", (1.0, 1e9), size=9)],
            "set exponent: 0, which leaves 0%",
            "granularity: model",
        ),
        (half(50), None, ""),  # they count from half of the parameters
        (half(51), "set granularity: model, which gives 0.5000 / 0.5000", ""),
        # Where priors vary; exponent 1 would leave all.
        (IN_TURN, "set exponent: 0, which leaves 0%", "granularity: model"),
        # By direction
        ([SMALL], "keeps only 4.0% of the task vector of a; set exp", ""),
        ([FAR], "moves 2.0 times as far as orthogonal experts would together", ""),
        *(([its], None, "") for its in QUIET),
    ],
)
def test_advice(entries, said, not_said, caplog):
    found = warnings(Summary(entries))
    assert len(found) == bool(said)
    for warning in found:
        assert said in warning
        assert not (not_said and not_said in warning)
    if entries and entries[0].directions:
        Watch().look_at(*entries, enough=1)
        assert len(caplog.records) == bool(said)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_nobody_dominates_an_expert_that_is_equal_to_the_base(exponent):
    found = Summary([entry("w", (3.0, 0.0), exponent=exponent)])
    assert warnings(found) == ["b is equal to the base, and gets no share of the merge."]
    assert [expert.mean for expert in found.experts] == [1.0, 0.0]


def test_what_is_summed_up_is_weighted_by_what_was_moved():
    rows = [((1.0, 4.0), (1.0, 0.5)), ((3.0, 0.0), (0.2, 0.0))]
    summary = Summary(by_direction(*row, tensor=f"layers.{n}.w") for n, row in enumerate(rows))
    assert [expert.kept for expert in summary.experts] == pytest.approx([0.4, 0.5])
    assert [expert.least for expert in summary.experts] == [0.2, 0.5]  # where an expert moves
    assert [expert.largest for expert in summary.experts] == [1.0, 0.5]
    first, second = summary.kept_by_layer
    assert first == [1.0, 0.5]
    assert second == pytest.approx([0.2, 0.0])
    assert summary.decided == (4, 8)


def test_a_sum_of_experts_at_right_angles_has_stretch_1():
    entries = [by_direction((1.0, 3.0)), by_direction((0.0, 0.0), directions=None)]
    assert Summary(entries).stretch == 1.0
    assert Summary([*entries, by_direction((1.0, 3.0), directions=None)]).stretch is None
    assert Summary(entries[1:]).stretch is None


def test_a_warning_waits_for_enough_parameters(caplog):
    watch, stretched = Watch(), replace(FAR, size=6)
    watch.look_at(stretched, enough=10)
    assert not caplog.records
    for _ in range(2):
        watch.look_at(stretched, enough=10)
        (record,) = caplog.records
        assert "moves 2.0 times as far" in record.getMessage()
