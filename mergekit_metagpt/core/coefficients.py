"""The formulas of the paper: scaling coefficients from squared norms of task vectors.

This module uses numbers only, no tensors or files.
"""

import math
from collections.abc import Iterable, Sequence
from operator import mul

# T numbers, one per expert.
Norms = tuple[float, ...]
# ⟨τ_i, τ_j⟩, a symmetric T x T matrix.
Gram = Sequence[Sequence[float]]
# What shares coefficients, such as a tensor or a layer: its Gram matrix, and its λ_t.
Scope = tuple[Gram, Sequence[float]]


def scaling_coefficients(
    squared_norms: Sequence[float],
    priors: Sequence[float] | None = None,
    exponent: float = 2.0,
) -> list[float]:
    """Return the coefficients λ_t that MetaGPT gives to T task vectors.

    Theorem 10 of the paper, with a prior w_t per expert and any exponent k::

        λ_t = w_t ‖τ_t‖^k / Σ_j w_j ‖τ_j‖^k

    k = 2 and equal priors are exactly MetaGPT, k = 0 is the plain average of the experts that
    differ from the base: one that equals it has the coefficient 0 for every k, as the limit
    k → 0 has it. The coefficients sum to 1, permute with the experts, and do not change when all
    task vectors are scaled by the same factor.

    Args:
        squared_norms: ‖τ_t‖², T finite floats that are at least 0.
        priors: w_t, T finite floats that are at least 0; all 1 when not given.
        exponent: k, finite and at least 0.

    Returns:
        T floats that sum to 1; all 0 when every task vector with a positive prior is
        zero, since the merge is then the base whatever the coefficients are.

    Raises:
        ValueError: if an argument is out of range or the lengths differ.

    >>> scaling_coefficients([1.0, 1.0, 2.0])
    [0.25, 0.25, 0.5]
    >>> scaling_coefficients([4.0, 1.0], exponent=1.0)
    [0.6666666666666666, 0.3333333333333333]
    >>> scaling_coefficients([4.0, 1.0], priors=[1.0, 4.0])
    [0.5, 0.5]
    >>> scaling_coefficients([0.0, 3.0])
    [0.0, 1.0]
    >>> scaling_coefficients([0.0, 3.0, 1.0], exponent=0.0)
    [0.0, 0.5, 0.5]
    """
    if priors is None:
        priors = [1.0] * len(squared_norms)
    if len(priors) != len(squared_norms):
        raise ValueError(f"{len(priors)} priors were given for {len(squared_norms)} task vectors.")
    for what, values in (
        ("squared norm", squared_norms),
        ("prior", priors),
        ("exponent", [exponent]),
    ):
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"A {what} must be finite and at least 0, not {value}.")

    # Ratios to the largest, so that no power overflows and the largest never underflows.
    largest_norm, largest_prior = max(squared_norms, default=0.0), max(priors, default=0.0)
    if largest_norm == 0 or largest_prior == 0:
        return [0.0] * len(squared_norms)
    shares = [
        (prior / largest_prior) * (norm / largest_norm) ** (exponent / 2) if norm else 0.0
        for norm, prior in zip(squared_norms, priors, strict=True)
    ]
    total = math.fsum(shares)  # exact, hence the same for every order of the experts
    return [share / total if total else 0.0 for share in shares]


def bound(scopes: Sequence[Scope]) -> float:
    """Return Σ_t ‖τ_t‖² ‖h_t‖², the bound of Theorem 8 on the average loss difference.

    h_t = Σ_k λ_k τ_k − τ_t is the distance of the merge to expert t (equation 7). The
    constant c of the theorem is left out, so only ratios of bounds are meaningful. For every
    Gram matrix, the coefficients of MetaGPT minimise the bound: they put the merge at the
    centroid of the experts, weighted by ‖τ_t‖². Squared lengths add up over the scopes of a model.

    >>> bound([([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5])])
    1.0
    >>> bound([([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]), ([[0.0, 0.0], [0.0, 1.0]], [0.0, 1.0])])
    2.0
    """
    distances = _sum_by_expert(_squared_distances(*scope) for scope in scopes)
    return math.fsum(map(mul, _squared_lengths(scopes), distances))


def kept_of(scopes: Sequence[Scope]) -> list[float]:
    """Return how much of each task vector τ_t is in the merged one M: ⟨M, τ_t⟩ / ‖τ_t‖², T floats.

    >>> kept_of([([[1.0, 0.0], [0.0, 4.0]], [0.25, 0.5])])
    [0.25, 0.5]
    """
    inside = _sum_by_expert(_products_with_merged(*scope) for scope in scopes)
    lengths = _squared_lengths(scopes)
    return [own / norm if norm else 0.0 for own, norm in zip(inside, lengths, strict=True)]


def _products_with_merged(gram: Gram, coefficients: Sequence[float]) -> Norms:
    """Return ⟨M, τ_t⟩, T floats."""
    return tuple(math.fsum(map(mul, coefficients, row)) for row in gram)


def _squared_distances(gram: Gram, coefficients: Sequence[float]) -> Norms:
    """Return ‖h_t‖², T floats."""
    merged = _products_with_merged(gram, coefficients)
    length = math.fsum(map(mul, coefficients, merged))
    return tuple(max(0.0, length - 2 * merged[t] + row[t]) for t, row in enumerate(gram))


def _squared_lengths(scopes: Sequence[Scope]) -> list[float]:
    return _sum_by_expert([row[t] for t, row in enumerate(gram)] for gram, _ in scopes)


def _sum_by_expert(rows: Iterable[Sequence[float]]) -> list[float]:
    return [math.fsum(column) for column in zip(*rows, strict=True)]
