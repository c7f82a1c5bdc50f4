"""Coefficients for every direction, against a plain float64 reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import as_float64, by_directions

from mergekit_metagpt.core import directions, task_vectors
from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms

SHAPES = [(12, 7), (7, 12), (40, 3), (3, 40), (1, 9), (9, 1), (16, 16)]
SCALES = (1.0, 0.1, 3.0)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fine_tunes(shape, scales=SCALES, seed=0, dtype=torch.float64):
    base = drawn(*shape, seed=seed)
    experts = [s * drawn(*shape, seed=seed + n) for n, s in enumerate(scales, 1)]
    return base.to(dtype), [(base + tau).to(dtype) for tau in experts]


def of_low_rank(shape, ranks, seed=0, dtype=torch.float64):
    """Return a base of zeros, and experts of these ranks."""
    m, n = shape
    taus = [
        drawn(m, rank, seed=seed + 2 * t) @ drawn(rank, n, seed=seed + 2 * t + 1)
        for t, rank in enumerate(ranks)
    ]
    return torch.zeros(m, n, dtype=dtype), [tau.to(dtype) for tau in taus]


def adapters(count, rank, drift, seed=0, shape=(256, 384), dtype=torch.float32):
    """Return a base, and LoRA adapters from one random start that were merged into it."""
    m, n = shape
    start = drawn(rank, n, seed=seed) / math.sqrt(n)
    base = (0.05 * drawn(m, n, seed=seed + 1)).to(dtype)
    taus = [
        0.02
        * drawn(m, rank, seed=seed + 2 + 2 * t)
        @ (start + drift * drawn(rank, n, seed=seed + 3 + 2 * t) / math.sqrt(n))
        for t in range(count)
    ]
    return base, [(base.double() + tau).to(dtype) for tau in taus]


def rule(experts, exponent=0.0, priors=None):
    return Rule(priors or [1.0] * len(experts), exponent)


def merge(base, experts, how=None, **options):
    """Return the merge, and its figures."""
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    found = merge_directions(base, experts, how or rule(experts), out=out, **options)
    return out, found


def task_vector(base, experts, how=None, **options):
    """Return M of the kernel, in float64."""
    base, experts = base.double(), [expert.double() for expert in experts]
    return merge(base, experts, how, **options)[0] - base


def wanted(base, experts, exponent=0.0, priors=None):
    return by_directions([as_float64(e) - as_float64(base) for e in experts], priors, exponent)


# The rule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_small_matrices_are_merged_as_the_reference_says(shape, exponent):
    base, experts = fine_tunes(shape)
    priors = [1.0, 2.0, 0.5]
    merged = task_vector(base, experts, rule(experts, exponent, priors))
    np.testing.assert_allclose(merged, wanted(base, experts, exponent, priors), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ranks", [(1, 1), (3, 8, 5), (directions._RANK,) * 4])
def test_large_matrices_of_low_rank_are_merged_as_the_reference_says(ranks, dtype):
    """The range finder finds the whole of them."""
    base, experts = of_low_rank((150, 120), ranks, dtype=dtype)
    merged = as_float64(merge(base, experts)[0])
    exact = wanted(base, experts)
    close = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(merged, exact, atol=close * abs(exact).max())


def test_the_range_finder_finds_leading_directions():
    """Of a spectrum that falls by a tenth each, it misses little of what rank r can hold."""
    left, right = (torch.linalg.qr(drawn(200, 200, seed=s)).Q for s in (1, 2))
    values = 0.9 ** torch.arange(200, dtype=torch.float64)
    expert = left @ (values.unsqueeze(1) * right.T)
    inputs = directions._Inputs(torch.zeros_like(expert), [expert], torch.float64, 0)
    ranges = directions._looked_at(inputs)[2]
    basis = directions._basis(ranges)
    assert basis.shape == (200, directions._RANK)
    held = (expert @ basis).square().sum() / values[: directions._RANK].square().sum()
    assert held > 0.85


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_rows_and_elements_have_a_coefficient_each(exponent):
    base, experts = fine_tunes((9, 4))
    taus = np.stack([as_float64(e) - as_float64(base) for e in experts])
    norms = (taus**2).sum((1, 2))
    priors = np.array([1.0, 0.5, 0.8])
    for role, squares in (
        (Role.ROWS, (taus**2).sum(2, keepdims=True)),
        (Role.ELEMENTS, taus**2),
    ):
        energies = squares * (priors * norms ** (exponent / 2 - 1))[:, None, None]
        shares = priors[:, None, None] * energies / energies.sum(0)
        merged = task_vector(base, experts, rule(experts, exponent, list(priors)), role=role)
        np.testing.assert_allclose(merged, (shares * taus).sum(0), atol=1e-12)


def test_a_transposed_matrix_is_merged_as_its_other_side():
    base, experts = fine_tunes((40, 60), dtype=torch.float32)
    turned = merge(base.T, [e.T for e in experts], name="w", role=Role.TRANSPOSED)[0].T
    assert torch.equal(turned, merge(base, experts, name="w")[0])


def test_a_stack_is_merged_matrix_by_matrix():
    base, experts = fine_tunes((2, 3, 20, 5))
    merged = task_vector(base, experts)
    for place in np.ndindex(2, 3):
        alone = wanted(base[place], [expert[place] for expert in experts])
        np.testing.assert_allclose(merged[place], alone, atol=1e-9)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (2, 1, 1)])
def test_tiny_tensors_merge(shape, role):
    if len(shape) < 2 and role is not Role.ELEMENTS:
        return
    base, experts = fine_tunes(shape)
    merged, found = merge(base, experts, role=role)
    assert merged.shape == shape
    assert merged.isfinite().all()
    assert len(found.kept) == len(experts)


# Algebra


@pytest.mark.parametrize("role", Role)
@given(
    shape=st.sampled_from([*SHAPES, (70, 60)]),
    exponent=st.sampled_from([0.0, 1.0, 2.0]),
    order=st.permutations(range(3)),
    power=st.sampled_from([2.0**-60, 0.25, 2.0**40]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_permuting_permutes_and_scaling_all_scales(role, shape, exponent, order, power):
    base, experts = fine_tunes(shape)
    base = torch.zeros_like(base)
    merged, found = merge(base, experts, rule(experts, exponent), role=role)
    close = {"rtol": 0, "atol": 1e-7 * float(merged.abs().max())}

    mixed = [experts[t] for t in order]
    permuted, its = merge(base, mixed, rule(mixed, exponent), role=role)
    torch.testing.assert_close(permuted, merged, **close)
    np.testing.assert_allclose(its.kept, [found.kept[t] for t in order], atol=1e-7)

    scaled, its = merge(base, [power * e for e in experts], rule(experts, exponent), role=role)
    torch.testing.assert_close(scaled / power, merged, **close)
    np.testing.assert_allclose(its.kept, found.kept, atol=1e-7)


def test_scaling_one_task_vector_scales_its_part():
    """Where λ does not depend on norms: here the second expert reads other inputs."""
    base, (first, second) = (
        torch.zeros(30, 40),
        (drawn(30, 40).float(), drawn(30, 40, seed=1).float()),
    )
    first[:, 20:] = 0
    second[:, :20] = 0
    merged = merge(base, [first, 5 * second])[0]
    torch.testing.assert_close(merged, first + 5 * second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_equal_experts_are_the_merge(role, count):
    base, (expert,) = fine_tunes((90, 80), scales=(1.0,), dtype=torch.float32)
    merged, found = merge(base, [expert] * count, role=role)
    torch.testing.assert_close(merged, expert, rtol=0, atol=1e-5)
    assert found.kept == pytest.approx([1.0] * count, abs=1e-5)
    assert found.squared_norm == pytest.approx(found.squared_norms[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("role", Role)
def test_one_expert_is_the_merge_bit_for_bit(role, dtype):
    base, (expert, _) = fine_tunes((30, 40), scales=(1.0, 1.0), dtype=dtype)
    assert torch.equal(merge(base, [expert], role=role)[0], expert)
    for others in ([expert, base], [base, expert, base]):
        merged, found = merge(base, others, role=role)
        assert torch.equal(merged, expert)
        assert sum(found.kept) == 1


def test_an_expert_that_is_there_twice_has_twice_the_say():
    base, (first, second) = fine_tunes((60, 5), scales=(1.0, 1.0), dtype=torch.float32)
    once, twice = (merge(base, them)[1] for them in ([first, second], [first, first, second]))
    assert twice.kept[0] == pytest.approx(twice.kept[1])
    assert once.kept[0] < twice.kept[0] <= 1.01
    assert twice.kept[2] < once.kept[1]


def test_a_prior_of_zero_leaves_the_expert_out():
    base, experts = fine_tunes((60, 50), dtype=torch.float32)
    merged, found = merge(base, experts, rule(experts, priors=[1.0, 0.0, 2.0]), name="w")
    others = [experts[0], experts[2]]
    assert torch.equal(merged, merge(base, others, rule(others, priors=[1.0, 2.0]), name="w")[0])
    assert found.kept[1] == 0


def test_a_prior_counts_relative_to_the_largest_also_of_an_expert_that_does_not_move():
    base, (expert,) = fine_tunes((60, 50), scales=(1.0,))
    merged = task_vector(base, [base, expert], rule([1, 2], priors=[2.0, 1.0]))
    torch.testing.assert_close(merged, (expert - base) / 2)


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


@pytest.mark.parametrize("role", Role)
def test_the_base_is_the_merge_if_no_expert_moves(role):
    base, _ = fine_tunes((20, 30), dtype=torch.bfloat16)
    merged, found = merge(base, [base.clone(), base.clone()], role=role)
    assert torch.equal(merged, base)
    assert found.kept == (0, 0)
    assert found.squared_norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drift", [0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_adapters_from_one_random_start_are_not_amplified(rank, drift, dtype):
    for count in (2, 3, 6):
        base, experts = adapters(count, rank, drift, dtype=dtype)
        found = merge_directions(base, experts, rule(experts))
        assert found.squared_norm <= 1.2 * sum(found.squared_norms), count


@pytest.mark.parametrize(
    "kind", ["rank one", "opposite", "almost equal", "one outlier", "20 experts", "zeros and one"]
)
def test_degenerate_task_vectors_give_finite_results(kind):
    base, (first, second) = fine_tunes((50, 40), scales=(1.0, 1.0), dtype=torch.float32)
    tau = first - base
    experts = {
        "rank one": [base + drawn(50, 1, seed=s) @ drawn(1, 40, seed=s + 9) for s in (1, 2)],
        "opposite": [first, base - tau],
        "almost equal": [first, first + 1e-6 * (second - base)],
        "one outlier": [first, base + 1e6 * (torch.arange(2000.0).view(50, 40) == 77)],
        "20 experts": fine_tunes((50, 40), scales=[1.0] * 20, dtype=torch.float32)[1],
        "zeros and one": [base, first, base, second],
    }[kind]
    experts = [expert.float() for expert in experts]
    merged, found = merge(base, experts)
    assert merged.isfinite().all()
    assert found.squared_norm <= 1.2 * sum(found.squared_norms)


# Numbers


@pytest.mark.parametrize("role", Role)
def test_the_figures_are_those_of_the_merge(role):
    base, experts = fine_tunes((70, 60))
    merged, found = merge(base, experts, role=role, scale=0.7)
    delta = merged - base
    assert found.squared_norm == pytest.approx(float(delta.square().sum()))
    products = [float((delta * (e - base)).sum()) for e in experts]
    assert found.squared_norms == pytest.approx(squared_norms(base, experts))
    assert found.kept == pytest.approx(
        [p / q for p, q in zip(products, found.squared_norms, strict=True)]
    )
    assert merge_directions(base, experts, rule(experts), role=role, scale=0.7) == found
    matrix = role in (Role.LINEAR, Role.TRANSPOSED)
    assert (found.decided is not None) == matrix
    assert found.inputs == (70 if role is Role.TRANSPOSED else 60 if matrix else found.inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("role", Role)
def test_any_dtype_is_calculated_in_float32_and_rounded_once(role, dtype):
    base, experts = fine_tunes((60, 50), dtype=dtype)
    merged = merge(base, experts, role=role, name="w")[0]
    assert merged.dtype == dtype
    exact = base.double() + task_vector(base, experts, role=role, name="w")
    wide = merge(base.float(), [e.float() for e in experts], role=role, name="w")[0]
    assert torch.equal(merged, wide.to(dtype))
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("role", Role)
def test_squares_out_of_float32s_range_are_taken_in_float64(role, scale):
    base, experts = fine_tunes((30, 40), dtype=torch.float32)
    base = torch.zeros_like(base)
    small = [(scale * e.double()).float() for e in experts]
    found, its = (merge_directions(base, es, rule(es), role=role) for es in (small, experts))
    assert found.kept == pytest.approx(its.kept, abs=1e-4)


def test_numbers_that_are_not_finite_are_refused():
    base, experts = fine_tunes((30, 40), dtype=torch.float32)
    experts[1][3, 5] = math.nan
    for role in Role:
        with pytest.raises(FloatingPointError):
            merge(base, experts, role=role)


@pytest.mark.parametrize("role", Role)
def test_an_expert_that_takes_no_part_must_be_finite_too(role):
    base, experts = fine_tunes((30, 40), dtype=torch.float32)
    experts[1][3, 5] = math.nan
    with pytest.raises(FloatingPointError):
        merge(base, experts, rule(experts, priors=[1.0, 0.0, 1.0]), role=role)


def test_a_range_that_overflows_float32_is_found_in_float64():
    _, experts = of_low_rank((30, 40), (1, 1))
    experts = [(1.7e19 * e / e.norm()).float() for e in experts]
    found = merge_directions(torch.zeros(30, 40), experts, rule(experts))
    assert found.kept == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("scale", [1e-160, 1e-170])
def test_task_vectors_whose_squares_underflow_even_in_float64_give_finite_results(scale):
    base, experts = (
        torch.zeros(30, 40, dtype=torch.float64),
        [scale * drawn(30, 40, seed=s) for s in (1, 2)],
    )
    for others in (experts, [experts[0], drawn(30, 40, seed=3)]):
        merged, found = merge(base, others)
        assert merged.isfinite().all()
        assert all(map(math.isfinite, found.kept))


def test_the_default_dtype_does_not_matter():
    base, experts = fine_tunes((90, 100), dtype=torch.float32)
    first = merge(base, experts, name="a")[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(merge(base, experts, name="a")[0], first)
    finally:
        torch.set_default_dtype(torch.float32)


def test_long_vectors_have_exact_figures():
    base, (expert,) = fine_tunes((3_000_000,), scales=(1.0,), dtype=torch.float32)
    found = merge_directions(base, [expert, expert], rule([1, 2]), role=Role.ELEMENTS)
    assert found.kept == pytest.approx([1, 1], abs=1e-5)


def test_what_is_left_of_an_expert_follows_its_prior_without_a_jump():
    base, experts = of_low_rank((150, 120), (5, 5))
    kept = [
        merge(base, experts, rule(experts, priors=[1.0, w]))[1].kept[1] for w in (0.8, 0.2, 0.05)
    ]
    np.testing.assert_allclose(kept, [0.8, 0.2, 0.05], atol=0.1)


def test_the_size_of_blocks_hardly_matters(monkeypatch):
    base, experts = fine_tunes((130, 120), dtype=torch.bfloat16)
    for role in Role:
        whole = merge(base, experts, role=role, name="w")[1]
        monkeypatch.setattr(task_vectors, "_BLOCK", 7 * 120 * 5)
        parts = merge(base, experts, role=role, name="w")[1]
        monkeypatch.undo()
        assert parts.kept == pytest.approx(whole.kept, abs=1e-4)


def test_what_is_drawn_follows_from_name_and_shape_only():
    base, experts = fine_tunes((90, 100), dtype=torch.float32)
    first = merge(base, experts, name="a")[0]
    state = torch.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(merge(base, experts, name="a")[0], first)
    torch.set_rng_state(state)
    assert not torch.equal(merge(base, experts, name="b")[0], first)


def test_another_default_device_does_not_matter():
    base, experts = fine_tunes((90, 100), dtype=torch.float32)
    first = merge(base, experts, name="a")[0]
    with torch.device("meta"):
        out = torch.empty(90, 100, device="cpu")
        merge_directions(base, experts, rule(experts), name="a", out=out)
    assert torch.equal(out, first)


@pytest.mark.parametrize("role", Role)
def test_strides_do_not_matter(role):
    base, experts = fine_tunes((60, 50), dtype=torch.float32)
    strided = [t.T.contiguous().T for t in (base, *experts)]
    assert torch.equal(
        merge(strided[0], strided[1:], role=role)[0], merge(base, experts, role=role)[0]
    )


def test_inputs_are_not_changed():
    base, experts = fine_tunes((60, 50), dtype=torch.float32)
    copies = [t.clone() for t in (base, *experts)]
    merge(base, experts)
    assert all(map(torch.equal, copies, (base, *experts)))


def test_gradients_are_refused():
    base, experts = fine_tunes((4, 3))
    experts[0].requires_grad_()
    with pytest.raises(ValueError, match="computes no gradients"):
        merge_directions(base, experts, rule(experts))
    with torch.no_grad():
        assert merge_directions(base, experts, rule(experts))


def test_a_single_mover_takes_the_path_of_the_plain_merge():
    base, experts = fine_tunes((60, 50), scales=(1.0,), dtype=torch.float32)
    assert torch.equal(
        merge(base, experts, scale=0.3)[0], add_task_vectors(base, experts, [1.0], 0.3)
    )
