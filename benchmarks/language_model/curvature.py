"""Scaling coefficients that may sum to more than 1: the curvature points along each task vector."""

from collections.abc import Sequence

import numpy as np


def curved_coefficients(
    products: Sequence[Sequence[float]], exponent: float, curvature: float
) -> tuple[float, ...]:
    """Return the λ that minimize Σ_t a_t h_tᵀ (I + κ τ_t τ_tᵀ / ‖τ_t‖²) h_t.

    Here h_t = Σ_k λ_k τ_k − τ_t. κ = 0 is the sum that Theorem 10 of the paper minimizes. With
    orthogonal task vectors, a larger κ lets each λ_t come closer to 1.

    Args:
        products: ⟨τ_i, τ_j⟩, T x T, of task vectors that are not zero.
        exponent: k in a_t = ‖τ_t‖^k.
        curvature: κ, at least 0.

    >>> curved_coefficients([[1.0, 0.0], [0.0, 1.0]], exponent=2, curvature=0)
    (0.5, 0.5)
    >>> curved_coefficients([[1.0, 0.0], [0.0, 1.0]], exponent=2, curvature=2)
    (0.75, 0.75)
    """
    gram = np.asarray(products)
    squares = gram.diagonal()
    weights = squares ** (exponent / 2)
    weights = weights / weights.sum()
    along = curvature * weights
    system = np.eye(len(gram)) + (along / squares)[:, np.newaxis] * gram
    return tuple(np.linalg.solve(system, weights + along).tolist())
