"""The algebra of the paper, as algebra."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergekit_metagpt import scaling_coefficients
from mergekit_metagpt.core.coefficients import bound as bound_of_products

norm = st.floats(1e-30, 1e30)
experts = st.lists(st.tuples(norm, st.floats(0.01, 100)), min_size=1, max_size=8)


@given(experts, st.randoms())
def test_permuting_the_experts_permutes_the_coefficients_exactly(experts, random):
    shuffled = experts.copy()
    random.shuffle(shuffled)
    plain = dict(zip(experts, scaling_coefficients(*zip(*experts, strict=True)), strict=True))
    moved = dict(zip(shuffled, scaling_coefficients(*zip(*shuffled, strict=True)), strict=True))
    assert plain == moved


@given(experts, st.floats(0, 8), st.floats(1e-20, 1e20))
def test_coefficients_are_the_formula_at_any_scale(experts, exponent, scale):
    squared_norms, priors = np.transpose(experts)
    shares = priors * np.sqrt(squared_norms / squared_norms.max()) ** exponent
    found = scaling_coefficients(list(scale * squared_norms), list(priors), exponent)
    assert found == pytest.approx(shares / shares.sum(), rel=1e-12)
    assert math.fsum(found) == pytest.approx(1)


@pytest.mark.parametrize("exponent", [0.0, 1e-9, 2.0])
def test_an_expert_equal_to_the_base_gets_nothing_at_any_exponent(exponent):
    assert scaling_coefficients([]) == []
    assert scaling_coefficients([1.0, 5.0], [0.0, 0.0], exponent) == [0.0, 0.0]
    assert scaling_coefficients([0.0, 4.0, 4.0], exponent=exponent) == [0.0, 0.5, 0.5]
    assert scaling_coefficients([0.0, 0.0], exponent=exponent) == [0.0, 0.0]
    assert scaling_coefficients([0.0, 1.0], [1.0, 0.0], exponent) == [0.0, 0.0]
    tiny = scaling_coefficients([1e-320, 1e300], exponent=0.0)  # not zero, but their ratio is
    assert tiny == [0.5, 0.5]
    huge = scaling_coefficients([1.0, 1.0], [1.6e308, 0.8e308], exponent)
    assert huge == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="squared norm must be finite and at least 0"):
        scaling_coefficients([1.0, bad])
    with pytest.raises(ValueError, match="prior must be finite and at least 0"):
        scaling_coefficients([1.0, 1.0], priors=[1.0, bad])
    with pytest.raises(ValueError, match="exponent must be finite and at least 0"):
        scaling_coefficients([1.0], exponent=bad)
    with pytest.raises(ValueError, match="1 priors were given for 2 task vectors"):
        scaling_coefficients([1.0, 1.0], priors=[1.0])


def bound(coefficients: np.ndarray, task_vectors: np.ndarray) -> float:
    """Σ_t ‖τ_t‖² ‖h_t‖² of theorem 8, for task vectors of shape [T, N]."""
    merged = coefficients @ task_vectors
    distances = ((merged - task_vectors) ** 2).sum(axis=1)
    return float(((task_vectors**2).sum(axis=1) * distances).sum())


task_vectors = st.tuples(st.integers(1, 5), st.integers(5, 12)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1, 1).map(lambda x: round(x, 3)))
)


@given(task_vectors, st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_no_perturbation_lowers_the_bound_even_for_correlated_task_vectors(vectors, seed):
    generator = np.random.default_rng(seed)
    best = np.array(scaling_coefficients((vectors**2).sum(axis=1)))
    least = bound(best, vectors)
    products = (vectors @ vectors.T).tolist()
    for scale in (1e-3, 1e-1, 1):
        moved = best + scale * generator.normal(size=best.shape)
        assert bound(moved, vectors) >= least * (1 - 1e-9)
        # It is read off the inner products.
        assert bound_of_products([(products, moved)]) == pytest.approx(
            bound(moved, vectors), abs=1e-9
        )
