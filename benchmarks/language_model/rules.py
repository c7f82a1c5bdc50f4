"""Merge rules that MergeKit does not have, written from their papers.

A rule sees the task vectors of one matrix, and returns the task vector of its merge.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_metagpt.core.roles import Role

_ISOTROPY = 0.01
_RATE, _STEPS = 1e-5, 300
# Below this part of the largest, a singular value is the rounding of a stored expert.
_LEAST = 1e-5


class Rule(NamedTuple):
    """What is done with a matrix, outputs x inputs, and with the rows of anything else.

    Both take τ_t, T x m x n in float32, of which some may be 0, but not all, and return M, m x n.
    """

    matrix: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]

    def of(self, role: Role) -> Callable[[Tensor], Tensor]:
        """Return what is done with a tensor of this role."""
        return self.matrix if is_matrix(role) else self.rows


def is_matrix(role: Role) -> bool:
    """Return whether a tensor of this role multiplies its inputs."""
    return role in (Role.LINEAR, Role.TRANSPOSED)


def matrices(tensor: Tensor, role: Role) -> list[Tensor]:
    """Return views of a tensor: its matrices, outputs x inputs, or one of the rows it consists of.

    Where each element is used by itself, the tensor is a single row.
    """
    if role is Role.ELEMENTS:
        return [tensor.view(1, -1)]
    if role is Role.ROWS:
        return [tensor.view(len(tensor), -1)]
    stack = list(tensor.view(-1, *tensor.shape[-2:]))
    return [matrix.T for matrix in stack] if role is Role.TRANSPOSED else stack


def moving(taus: Tensor) -> Tensor:
    """Return the task vectors that are not 0."""
    moves = taus.flatten(1).any(1)
    return taus if moves.all() else taus[moves]


def by_rows(taus: Tensor, exponent: float = 0.0, isotropy: float = 0.0) -> Tensor:
    """Merge with a coefficient for each row, in proportion to how far the expert moves it.

    Args:
        taus: τ_t, T x m x n. A single row has a coefficient for each element.
        exponent: k in λ_t ∝ ‖τ_t‖^k, the sum of an expert's coefficients before they are divided
            by those of all experts.
        isotropy: the part of λ_t that is spread evenly over the rows.
    """
    if taus.shape[1] == 1 < taus.shape[2]:
        return by_rows(taus.mT, exponent, isotropy).T
    taus = moving(taus)
    squares = taus.square().sum(2, dtype=torch.float64)
    norms = squares.sum(1, keepdim=True)
    shares = norms ** (exponent / 2) * ((1 - isotropy) * squares / norms + isotropy / len(taus[0]))
    shares /= shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)
    merged: Tensor = (shares.unsqueeze(2).to(taus) * taus).sum(0)
    return merged


def _previous(taus: Tensor) -> Tensor:
    """Granularity direction of this package before: M = Σ_t τ_t S_t (Σ_k S_k)⁻¹ in all directions.

    S_t = (1/T) [(1 − ρ) τ_tᵀ τ_t / ‖τ_t‖² + (ρ/n) I] with ρ = 0.01.
    """
    taus = moving(taus).double()
    count, _, n = taus.shape
    numerator, total = torch.zeros_like(taus.sum(0)), taus.new_zeros(n, n)
    for tau in taus:
        share = (1 - _ISOTROPY) * (tau.T @ tau) / tau.square().sum()
        share.diagonal().add_(_ISOTROPY / n)
        numerator.addmm_(tau, share, alpha=1 / count)
        total.add_(share, alpha=1 / count)
    merged: Tensor = torch.linalg.solve(total, numerator, left=False).float()
    return merged


def _tsv_m(taus: Tensor) -> Tensor:
    """TSV-M: singular vectors of all experts, made orthogonal.

    Of each τ_t, the leading 1/T of its singular components are kept. What is nearest to their left
    vectors together with orthonormal columns, and the same for the right ones, take their places;
    the singular values stay. The scale is 1.

    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR
    2025, arXiv 2412.00081.
    """
    count, m, n = taus.shape
    if m < n:
        return _tsv_m(taus.mT).T
    parts = [_components(tau.double(), max(1, n // count)) for tau in moving(taus)]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return ((_orthogonalized(left) * values) @ _orthogonalized(right).T).float()


def _components(tau: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular components: m x k, k and n x k, with k at most the count."""
    squares, vectors = torch.linalg.eigh(tau.T @ tau)
    values = squares.clamp_min(0).sqrt().flip(0)[:count]
    values = values[values > _LEAST * values[0]]
    right = vectors.flip(1)[:, : len(values)]
    return tau @ right / values, values, right


def _orthogonalized(columns: Tensor) -> Tensor:
    """Return P Qᵀ for columns P D Qᵀ: the nearest matrix with orthonormal columns (Procrustes)."""
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    roots = squares.clamp_min(_LEAST**2).sqrt()
    nearest: Tensor = columns @ (vectors / roots) @ vectors.T
    return nearest


def _wudi(taus: Tensor) -> Tensor:
    """WUDI-Merging: minimize how the merge disturbs each expert, where that expert reads.

    The loss Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖² has the gradient 2 (M C − D) with
    C = Σ_t τ_tᵀ τ_t / ‖τ_t‖² and D = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖². Adam takes 300 steps from Σ_t τ_t,
    with a rate of 1e-5. Only the product of C and the steps taken so far is rounded to bfloat16.

    Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging
    via Task Vectors", ICML 2025, arXiv 2503.08099.
    """
    start = taus.sum(0)
    grams = [tau.T @ tau / tau.square().sum() for tau in moving(taus)]
    curvature = torch.stack(grams).sum(0)
    slope = 2 * start @ curvature
    for tau, gram in zip(moving(taus), grams, strict=True):
        slope.addmm_(tau, gram, alpha=-2)
    moved = torch.nn.Parameter(torch.zeros_like(start))
    optimizer = torch.optim.Adam([moved], lr=_RATE, fused=True)
    fast = curvature.bfloat16()
    for _ in range(_STEPS):
        moved.grad = slope + 2 * (moved.detach().bfloat16() @ fast)
        optimizer.step()
    return start + moved.detach()


def _mean(taus: Tensor) -> Tensor:
    return taus.mean(0)


# TSV-M averages what is no matrix. The paper of WUDI-Merging does not say; it is averaged here too.
RULES = {
    "previous": Rule(_previous, partial(by_rows, isotropy=_ISOTROPY)),
    "tsv_m": Rule(_tsv_m, _mean),
    "wudi": Rule(_wudi, _mean),
}
