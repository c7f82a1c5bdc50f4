"""Coefficients for every direction, against a plain float64 reference."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import as_float64, by_role
from reference import fine_tunes as tuned

from mergekit_metagpt.core import matrices, range_finder
from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.matrices import MatrixInputs
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms

SHAPES = [(12, 7), (7, 12), (40, 3), (3, 40), (1, 9), (9, 1), (16, 16)]
each_role = pytest.mark.parametrize("role", Role)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fine_tunes(shape, scales=(1.0, 0.1, 3.0), dtype=torch.float64):
    return tuned(shape, dtype, scales)


def of_low_rank(shape, ranks, dtype=torch.float64):
    """Return a base of zeros, and experts of these ranks."""
    m, n = shape
    taus = [drawn(m, r, seed=2 * t) @ drawn(r, n, seed=2 * t + 1) for t, r in enumerate(ranks)]
    return torch.zeros(m, n, dtype=dtype), [tau.to(dtype) for tau in taus]


def adapters(count, rank, drift, dtype, shape=(256, 384)):
    """Return a base, and LoRA adapters from one random start that were merged into it."""
    (m, n), base = shape, 0.05 * drawn(*shape, seed=1)

    def inputs(seed):
        return drawn(rank, n, seed=seed) / math.sqrt(n)

    taus = [
        0.02 * drawn(m, rank, seed=2 + 2 * t) @ (inputs(0) + drift * inputs(3 + 2 * t))
        for t in range(count)
    ]
    return base.to(dtype), [(base.to(dtype).double() + tau).to(dtype) for tau in taus]


def rule(experts, exponent=0.0, priors=None):
    return Rule(priors or [1.0] * len(experts), exponent)


def merge(base, experts, how=None, **options):
    """Return the merge, and its figures."""
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    found = merge_directions(base, experts, how or rule(experts), out=out, **options)
    return out, found


def wanted(base, experts, how=None, role=Role.LINEAR):
    """Return M of the reference."""
    how, origin = how or rule(experts), as_float64(base)
    taus = [as_float64(expert) - origin for expert in experts]
    return by_role(taus, role.name, how.priors, how.exponent)


# The rule


@given(
    role=st.sampled_from(Role),
    shape=st.sampled_from([*SHAPES, (70, 60), (2, 3, 20, 5), (2, 1, 1), (1, 1), (5,), ()]),
    exponent=st.sampled_from([0.0, 1.0, 2.0]),
    priors=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3).filter(any),
    moves=st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0]), min_size=3, max_size=3),
    scale=st.sampled_from([1.0, 0.7, -2.0]),
)
@settings(max_examples=150)
def test_tensors_are_merged_as_the_reference_says_and_the_figures_are_those_of_the_merge(
    role, shape, exponent, priors, moves, scale
):
    role = role if len(shape) > 1 else Role.ELEMENTS
    base, experts = fine_tunes(shape, moves)
    how = rule(experts, exponent, priors)
    merged, found = merge(base, experts, how, role=role, scale=scale)
    assert merge_directions(base, experts, how, role=role, scale=scale) == found
    delta = merged - base
    if shape != (70, 60):  # of which the range finder leaves something out
        expected = scale * wanted(base, experts, how, role)
        largest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-9 * largest)
    assert found.squared_norm == pytest.approx(float(delta.square().sum()), 1e-9, 1e-12)
    assert found.squared_norms == pytest.approx(squared_norms(base, experts))
    for kept, expert, its in zip(found.kept, experts, priors, strict=True):
        tau = (expert - base).flatten()
        inside = (delta.flatten() @ tau / (tau @ tau).clamp_min(1e-300)) * bool(its)
        assert kept == pytest.approx(float(inside), abs=1e-9)
    axes = {Role.LINEAR: -1, Role.TRANSPOSED: -2}
    assert (found.decided is not None) == (role in axes)
    if role in axes:
        assert found.inputs == shape[axes[role]] * math.prod(shape[:-2])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("ranks", [(1, 1), (3, 8, 5), (range_finder.RANK,) * 4])
@pytest.mark.parametrize("rows", [150, 600])
def test_large_matrices_of_low_rank_are_merged_as_the_reference_says(rows, ranks, dtype, close):
    """The range finder finds the whole of them, also in a sample of the rows."""
    base, experts = of_low_rank((rows, 120), ranks, dtype)
    exact = wanted(base, experts)
    merged = as_float64(merge(base, experts)[0])
    np.testing.assert_allclose(merged, exact, atol=close * abs(exact).max())


def test_the_range_finder_finds_leading_directions():
    """Of a spectrum that falls by a tenth each, it misses little of what rank r can hold."""
    left, right = (torch.linalg.qr(drawn(rows, 200, seed=s)).Q for s, rows in ((1, 8000), (2, 200)))
    values = 0.9 ** torch.arange(200, dtype=torch.float64)
    expert = left @ (values.unsqueeze(1) * right.T)
    inputs = MatrixInputs(torch.zeros_like(expert), [expert], torch.float64, 0)
    basis = range_finder.basis_of(inputs, range_finder.drawn_rows(inputs))
    assert basis.shape == (200, range_finder.RANK)
    held = (expert @ basis).square().sum() / values[: range_finder.RANK].square().sum()
    assert held > 0.85


@pytest.mark.parametrize("others", [["lora"], ["lora", "lora of another"], ["alike", "other"]])
def test_rounding_errors_of_experts_of_low_rank_or_alike_decide_nothing(others):
    """Else they would depend on the order of the experts, and on the number of threads."""
    shape, dtype = (300, 200), torch.float32
    base, (lora, another) = of_low_rank(shape, (2, 3), dtype)
    falling = 0.98 ** torch.arange(200) / 14
    expert, other = ((drawn(*shape, seed=n) * falling).to(dtype) for n in (8, 9))
    known = {"lora": lora, "lora of another": another, "alike": expert.clone(), "other": other}
    experts = [expert, *(known[name] for name in others)]
    merged, _ = merge(base, experts)
    turned, _ = merge(base, experts[::-1])
    np.testing.assert_allclose(merged, turned, atol=1e-6 * float(merged.abs().max()))


@pytest.mark.parametrize("moved", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_few_rows_that_move_far_are_not_missed(moved, drift):
    """Such as those of new tokens in a head, or outliers; a sample of the rows hardly has any."""
    m, n = 4096, 96
    rows = torch.randperm(m, generator=torch.Generator().manual_seed(moved))[:moved]
    base, experts = torch.zeros(m, n, dtype=torch.float64), []
    for t in range(3):
        tau = drift * drawn(m, 3, seed=t) @ drawn(3, n, seed=10 + t)
        tau[rows] += 300 * drawn(moved, 3, seed=20 + t) @ (drawn(3, n) + drawn(3, n, seed=30 + t))
        experts.append(tau)
    exact = wanted(base, experts)
    merged = as_float64(merge(base, experts)[0])
    np.testing.assert_allclose(merged, exact, atol=1e-3 * abs(exact).max())


def test_what_the_range_finder_does_not_see_is_added_up(monkeypatch):
    monkeypatch.setattr(range_finder, "_ranges", lambda inputs, rows: torch.zeros(2, 8, 100))
    base, (first, second) = torch.zeros(600, 100), torch.zeros(2, 600, 100)
    first[300, 50:], second[301, 50:] = drawn(2, 50).float()
    for experts, expected in (([first, second], first + second), ([first, first], first)):
        assert torch.allclose(merge(base, experts)[0], expected, atol=1e-6)


# Algebra


@each_role
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_equal_experts_are_the_merge(role, count):
    base, (expert,) = fine_tunes((90, 80), scales=(1.0,), dtype=torch.float32)
    merged, found = merge(base, [expert] * count, role=role)
    torch.testing.assert_close(merged, expert, rtol=0, atol=1e-5)
    assert found.kept == pytest.approx([1.0] * count, abs=1e-5)
    assert found.squared_norm == pytest.approx(found.squared_norms[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_role
def test_one_expert_or_the_base_is_the_merge_bit_for_bit(role, dtype):
    base, (expert,) = fine_tunes((30, 40), scales=(1.0,), dtype=dtype)
    for experts in ([expert], [expert, base], [base, expert, base]):
        merged, found = merge(base, experts, role=role)
        assert torch.equal(merged, expert)
        assert sum(found.kept) == 1
        weighted = add_task_vectors(base, [expert], [1.0], 0.3)  # as the plain merge does
        assert torch.equal(merge(base, experts, role=role, scale=0.3)[0], weighted)
    merged, found = merge(base, [base.clone(), base.clone()], role=role)
    assert torch.equal(merged, base)
    assert (found.kept, found.squared_norm) == ((0, 0), 0)


@pytest.mark.parametrize("exponent", [0.0, 2.0])
@pytest.mark.parametrize("rank", [2, 30])
def test_experts_that_read_different_inputs_are_added_up_whole(rank, exponent):
    base, experts = of_low_rank((100, 90), (rank, rank, rank))
    for t, expert in enumerate(experts):
        expert[:, : 30 * t] = 0
        expert[:, 30 * (t + 1) :] = 0
    merged, found = merge(base, experts, rule(experts, exponent))
    torch.testing.assert_close(merged, sum(experts), rtol=0, atol=1e-6)
    assert found.kept == pytest.approx([1.0] * 3)
    assert found.squared_norm == pytest.approx(sum(found.squared_norms))


@pytest.mark.parametrize("drift", [0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("count", [2, 6])
def test_adapters_from_one_random_start_are_not_amplified(count, drift):
    for rank, dtype in ((4, torch.float32), (64, torch.bfloat16)):
        base, experts = adapters(count, rank, drift, dtype)
        found = merge_directions(base, experts, rule(experts))
        assert found.squared_norm <= 1.2 * sum(found.squared_norms), rank


def test_degenerate_task_vectors_give_finite_results():
    base, (first, second) = fine_tunes((50, 40), scales=(1.0, 1.0))
    for kind, experts in {
        "rank one": [base + drawn(50, 1, seed=s) @ drawn(1, 40, seed=s + 9) for s in (1, 2)],
        "opposite": [first, 2 * base - first],
        "almost equal": [first, first + 1e-6 * (second - base)],
        "one outlier": [first, base + 1e6 * (torch.arange(2000.0).view(50, 40) == 77)],
        "20 experts": fine_tunes((50, 40), scales=[1.0] * 20)[1],
        "zeros and one": [base, first, base, second],
    }.items():
        experts = [expert.float() for expert in experts]
        merged, found = merge(base.float(), experts)
        assert merged.isfinite().all(), kind
        assert found.squared_norm <= 1.2 * sum(found.squared_norms), kind
    zeros = torch.zeros(30, 40, dtype=torch.float64)
    for scale in (1e-160, 1e-170):  # whose squares underflow even in float64
        first, second = (scale * drawn(30, 40, seed=s) for s in (1, 2))
        for experts in ([first, second], [first, drawn(30, 40, seed=3)]):
            merged, found = merge(zeros, experts)
            assert merged.isfinite().all()
            assert all(map(math.isfinite, found.kept))


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@each_role
def test_any_dtype_is_calculated_in_float32_and_rounded_once(role, dtype):
    base, experts = fine_tunes((60, 50), dtype=dtype)
    merged = merge(base, experts, role=role, name="w")[0]
    assert merged.dtype == dtype
    exact = merge(base.double(), [e.double() for e in experts], role=role, name="w")[0]
    wide = merge(base.float(), [e.float() for e in experts], role=role, name="w")[0]
    assert torch.equal(merged, wide.to(dtype))
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@each_role
def test_squares_out_of_float32s_range_are_taken_in_float64(role, scale):
    _, experts = fine_tunes((30, 40), dtype=torch.float32)
    scaled = [(scale * e.double()).float() for e in experts]
    zeros = torch.zeros(30, 40)
    found, its = (merge_directions(zeros, es, rule(es), role=role) for es in (scaled, experts))
    assert found.kept == pytest.approx(its.kept, abs=1e-4)
    _, experts = of_low_rank((30, 40), (1, 1))  # products overflow, and squares do not
    experts = [(1.7e19 * e / e.norm()).float() for e in experts]
    found = merge_directions(zeros, experts, rule(experts))
    assert found.kept == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("prior", [1.0, 0.0])
@each_role
def test_numbers_that_are_not_finite_are_refused_also_where_the_expert_takes_no_part(role, prior):
    base, experts = fine_tunes((30, 40), dtype=torch.float32)
    experts[1][3, 5] = math.nan
    with pytest.raises(FloatingPointError):
        merge(base, experts, rule(experts, priors=[1.0, prior, 1.0]), role=role)


def test_long_vectors_have_exact_figures():
    base, (expert,) = fine_tunes((3_000_000,), scales=(1.0,), dtype=torch.float32)
    found = merge_directions(base, [expert, expert], rule([1, 2]), role=Role.ELEMENTS)
    assert found.kept == pytest.approx([1, 1], abs=1e-5)


@each_role
def test_the_size_of_blocks_hardly_matters(role, monkeypatch):
    base, experts = fine_tunes((130, 120), dtype=torch.bfloat16)
    whole = merge(base, experts, role=role, name="w")[1]
    monkeypatch.setattr(matrices, "BLOCK", 7 * 120 * 5)
    parts = merge(base, experts, role=role, name="w")[1]
    assert parts.kept == pytest.approx(whole.kept, abs=1e-4)


@each_role
def test_the_bits_follow_from_values_and_the_name_only(role, request):
    base, experts = fine_tunes((90, 100), dtype=torch.float32)
    copies = [t.clone() for t in (base, *experts)]
    first = merge(base, experts, role=role, name="a")[0]
    strided = [t.T.contiguous().T for t in (base, *experts)]
    out = torch.empty_like(base)
    torch.manual_seed(123)
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        merge_directions(strided[0], strided[1:], rule(experts), role=role, name="a", out=out)
    assert torch.equal(out, first)
    assert all(map(torch.equal, copies, (base, *experts)))
    if role in (Role.LINEAR, Role.TRANSPOSED):
        assert not torch.equal(merge(base, experts, role=role, name="b")[0], first)


def test_gradients_are_refused():
    base, experts = fine_tunes((4, 3))
    experts[0].requires_grad_()
    with pytest.raises(ValueError, match="computes no gradients"):
        merge_directions(base, experts, rule(experts))
