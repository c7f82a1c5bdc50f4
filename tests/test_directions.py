"""Coefficients for every direction, against a plain float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_metagpt.core.coefficients import scaling_coefficients
from mergekit_metagpt.core.directions import SIDES, Rule, merge_directions
from mergekit_metagpt.core.normal_equations import operations
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms

SHAPES = [(12, 7), (7, 12), (40, 3), (3, 40), (1, 9), (9, 1), (16, 16)]
SCALES = (1.0, 0.1, 3.0)


def fine_tunes(shape, scales=SCALES, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = noise()
    return base.to(dtype), [(base + scale * noise()).to(dtype) for scale in scales]


def rule(experts, exponent=2.0, isotropy=0.1, side="output", priors=None):
    return Rule(priors or [1.0] * len(experts), exponent, isotropy, side)


def reference(task_vectors, rule):
    """Return M and the means of Λ_t as the definition says it, with one large linear system."""
    m, n = task_vectors[0].shape
    parts = []
    for prior, tau in zip(rule.priors, task_vectors, strict=True):
        square = (tau * tau).sum()
        rho, weight = rule.isotropy, prior * square ** (rule.exponent / 2 - 1)
        rows = weight * ((1 - rho) * tau @ tau.T + rho * square / m * np.eye(m))
        columns = weight * ((1 - rho) * tau.T @ tau + rho * square / n * np.eye(n))
        left, right = np.kron(rows, np.eye(n)), np.kron(np.eye(m), columns)
        parts.append({"output": left, "input": right, "both": left + right}[rule.side])
    coefficients = [np.linalg.solve(sum(parts), part) for part in parts]
    merged = sum(c @ tau.ravel() for c, tau in zip(coefficients, task_vectors, strict=True))
    return merged.reshape(m, n), [np.trace(c) / (m * n) for c in coefficients]


def task_vector(base, experts, rule, **options):
    """Return M of the kernel, in float64."""
    merged = merge_directions(base.double(), [e.double() for e in experts], rule, **options).merged
    return merged - base.double()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isotropy", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_merge_is_the_minimum_of_the_bound(shape, side, isotropy, exponent):
    base, experts = fine_tunes(shape)
    settings = rule(experts, exponent, isotropy, side, priors=[1.0, 2.0, 0.5])
    wanted, means = reference([(e - base).numpy() for e in experts], settings)
    found = merge_directions(base, experts, settings)
    error = np.linalg.norm((found.merged - base).numpy() - wanted) / np.linalg.norm(wanted)
    assert error < 1e-9
    assert found.means == pytest.approx(means, abs=1e-9)
    kept = [float((wanted * (e - base).numpy()).sum() / ((e - base) ** 2).sum()) for e in experts]
    assert found.kept == pytest.approx(kept)
    assert found.squared_norm == pytest.approx(float(np.square(wanted).sum()))


@pytest.mark.parametrize("side", SIDES)
def test_ill_conditioned_matrices_are_right_to_a_ten_thousandth(side):
    """Singular values over ten orders of magnitude, and float32 inputs."""
    generator = torch.Generator().manual_seed(3)
    base = torch.zeros(20, 14)
    experts = []
    for scale in (1.0, 1e-3, 1e3):
        u, _ = torch.linalg.qr(torch.randn(20, 14, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(14, 14, generator=generator, dtype=torch.float64))
        values = 10.0 ** torch.linspace(0, -10, 14, dtype=torch.float64)
        experts.append((scale * u @ torch.diag(values) @ v).float())
    settings = rule(experts, isotropy=0.01, side=side)
    wanted, _ = reference([e.double().numpy() for e in experts], settings)
    found = merge_directions(base, experts, settings).merged.double().numpy()
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_full_isotropy_is_granularity_tensor(side, exponent):
    base, experts = fine_tunes((12, 7), dtype=torch.float32)
    coefficients = scaling_coefficients(squared_norms(base, experts), None, exponent)
    found = merge_directions(base, experts, rule(experts, exponent, 1.0, side), scale=0.7)
    torch.testing.assert_close(found.merged, add_task_vectors(base, experts, coefficients, 0.7))
    assert found.means == pytest.approx(coefficients)
    nearly = merge_directions(base, experts, rule(experts, exponent, 1 - 1e-9, side), scale=0.7)
    torch.testing.assert_close(nearly.merged, found.merged)


def test_a_vector_has_a_coefficient_for_each_element():
    base, experts = fine_tunes((50,))
    taus = [(e - base).numpy() for e in experts]
    squares = [0.9 * tau**2 + 0.1 * (tau**2).sum() / 50 for tau in taus]
    wanted = sum(s * tau for s, tau in zip(squares, taus, strict=True)) / sum(squares)
    found = merge_directions(base, experts, rule(experts))
    np.testing.assert_allclose((found.merged - base).numpy(), wanted)
    assert found.means == pytest.approx([float((s / sum(squares)).mean()) for s in squares])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_vocabulary_has_a_coefficient_for_each_token(axis, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.core.directions._BLOCK", 64)  # several blocks
    base, experts = fine_tunes((50, 6))
    taus = [(e - base).numpy() for e in experts]
    rows = [0.9 * (tau**2).sum(1) + 0.1 * (tau**2).sum() / 50 for tau in taus]
    wanted = sum(r[:, None] * tau for r, tau in zip(rows, taus, strict=True))
    wanted /= sum(rows)[:, None]
    if axis:
        base, experts, wanted = base.T, [e.T for e in experts], wanted.T
    found = merge_directions(base, experts, rule(experts), vocabulary_axis=axis)
    np.testing.assert_allclose((found.merged - base).numpy(), wanted)


def test_a_stack_is_merged_matrix_by_matrix():
    base, experts = fine_tunes((2, 3, 5, 4))
    settings = rule(experts, side="input")
    found = merge_directions(base, experts, settings)
    for i in range(2):
        for j in range(3):
            alone = merge_directions(base[i, j], [e[i, j] for e in experts], settings)
            assert torch.equal(found.merged[i, j], alone.merged)
    assert sum(found.means) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1, 1)])
def test_tiny_tensors_merge(shape):
    base, experts = fine_tunes(shape)
    found = merge_directions(base, experts, rule(experts))
    assert found.merged.shape == base.shape
    assert found.merged.isfinite().all()


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(SIDES),
    st.sampled_from([0.0, 1e-3, 0.3]),
    st.sampled_from([0.0, 2.0]),
    st.permutations(range(3)),
    st.integers(-40, 40),
)
def test_algebra(shape, side, isotropy, exponent, order, power):
    base, experts = fine_tunes(shape)
    settings = rule(experts, exponent, isotropy, side)
    found = merge_directions(base, experts, settings)
    # The coefficients of all experts sum to the identity.
    assert sum(found.means) == pytest.approx(1)
    # Permuting the experts permutes the coefficients.
    permuted = merge_directions(base, [experts[t] for t in order], settings)
    torch.testing.assert_close(permuted.merged, found.merged, rtol=1e-6, atol=1e-6)
    assert permuted.means == pytest.approx([found.means[t] for t in order], rel=1e-5, abs=1e-8)
    # Scaling all task vectors scales the merged one.
    zero = torch.zeros_like(base)
    taus = [e - base for e in experts]
    one = merge_directions(zero, taus, settings).merged
    many = merge_directions(zero, [tau * 2.0**power for tau in taus], settings).merged
    torch.testing.assert_close(many * 2.0**-power, one, rtol=1e-6, atol=1e-6)
    # Transposing swaps the sides.
    swapped = {"output": "input", "input": "output", "both": "both"}[side]
    turned = merge_directions(
        base.T, [e.T for e in experts], rule(experts, exponent, isotropy, swapped)
    )
    torch.testing.assert_close(turned.merged.T, found.merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("isotropy", [0.0, 0.01, 0.5])
def test_equal_experts_are_the_merge(side, isotropy):
    """Σ_t Λ_t = I: what all experts agree on is kept whole."""
    base, [expert] = fine_tunes((9, 30), (1.0,))
    found = merge_directions(base, [expert] * 3, rule([expert] * 3, 2.0, isotropy, side))
    torch.testing.assert_close(found.merged, expert, rtol=1e-6, atol=1e-6)
    assert found.means == pytest.approx([1 / 3] * 3)
    assert found.kept == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_experts_that_move_different_directions_are_added_up_whole(side, exponent):
    base = torch.zeros(6, 6)
    first, second = torch.zeros(6, 6), torch.zeros(6, 6)
    first[:3, :3] = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    second[3:, 3:] = 5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    settings = rule([first, second], exponent, 0.0, side)
    found = merge_directions(base, [first, second], settings)
    torch.testing.assert_close(found.merged, first + second, rtol=1e-3, atol=1e-3)
    assert found.kept == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_an_expert_equal_to_the_base_takes_no_part(side, exponent):
    base, experts = fine_tunes((8, 5))
    settings = rule(experts, exponent, 0.1, side)
    found = merge_directions(base, experts, settings)
    four = [*experts, base.clone()]
    besides = merge_directions(base, four, rule(four, exponent, 0.1, side))
    torch.testing.assert_close(besides.merged, found.merged)
    assert besides.means[3] == besides.kept[3] == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vocabulary_axis", [None, 0])
def test_the_base_is_the_merge_if_no_expert_moves(side, vocabulary_axis):
    base, _ = fine_tunes((8, 5))
    settings = rule([base, base], side=side)
    found = merge_directions(base, [base, base], settings, vocabulary_axis=vocabulary_axis)
    assert torch.equal(found.merged, base)
    assert found.means == found.kept == (0.0, 0.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("isotropy", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["constant", "rank one", "one element"])
def test_degenerate_task_vectors_give_finite_results(side, isotropy, kind):
    base, experts = fine_tunes((8, 5), dtype=torch.bfloat16)
    experts = [base.clone() for _ in experts]
    if kind == "constant":
        experts = [base + t + 1 for t in range(3)]
    elif kind == "rank one":
        experts = [base + torch.outer(torch.ones(8), torch.arange(5.0) - t) for t in range(3)]
    else:
        experts[1][2, 3] += 1
    experts = [e.to(torch.bfloat16) for e in experts]
    found = merge_directions(base, experts, rule(experts, 2.0, isotropy, side))
    assert found.merged.isfinite().all()
    assert sum(found.means) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_is_rounded_once(dtype):
    base, experts = fine_tunes((12, 7), dtype=dtype)
    exact = task_vector(base, experts, rule(experts))
    found = merge_directions(base, experts, rule(experts))
    assert found.merged.dtype == dtype
    assert torch.equal(found.merged, (base.double() + exact).to(dtype))


def test_strides_do_not_matter():
    base, experts = fine_tunes((12, 7), dtype=torch.float32)
    found = merge_directions(base, experts, rule(experts))
    strided = [t.T.contiguous().T for t in (base, *experts)]
    again = merge_directions(strided[0], strided[1:], rule(experts))
    assert torch.equal(again.merged, found.merged)
    assert again.merged.is_contiguous()


def test_inputs_are_not_changed():
    base, experts = fine_tunes((12, 7))
    copies = [t.clone() for t in (base, *experts)]
    merge_directions(base, experts, rule(experts))
    assert all(torch.equal(a, b) for a, b in zip(copies, (base, *experts), strict=True))


def test_gradients_are_refused():
    base, experts = fine_tunes((12, 7))
    experts[0].requires_grad_()
    with pytest.raises(ValueError, match=r"direction computes no gradients; merge under torch\."):
        merge_directions(base, experts, rule(experts))
    with torch.no_grad():
        assert merge_directions(base, experts, rule(experts)).merged.isfinite().all()


def test_the_cheaper_form_of_a_tall_matrix_is_the_small_one():
    primal, dual = operations(4096, 64, 3)
    assert dual < primal / 10
    primal, dual = operations(64, 4096, 3)
    assert primal < dual / 10
