"""Solvers of Σ_t S_t (M − τ_t) = 0 for one matrix; see :mod:`mergekit_metagpt.core.directions`.

Here S_t = λ_t [(1 − ρ) u_t u_tᵀ + (ρ/m) I], where u_t = τ_t / ‖τ_t‖ is m x n, Σ_t λ_t = 1, and
A = Σ_t S_t. All is float64, since an error of a float32 product would grow by the condition number
of A, up to m/ρ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# M, m x n in float64, and for each expert tr(A⁻¹ λ_t (1 − ρ) u_t u_tᵀ) / m: what the directed
# part of S_t has of all directions.
Solution = tuple[Tensor, list[float]]


@dataclass(frozen=True)
class Equations:
    """The experts of a matrix that move, T of them.

    Attributes:
        task_vector: returns τ_t, m x n in float64, for t < T. A second argument chooses one of
            two buffers that hold it; the next call with the same buffer overwrites it.
        shape: m and n.
        squared_norms: ‖τ_t‖², T positive floats.
        traces: λ_t, T positive floats that sum to 1.
        isotropy: ρ, above 0 and below 1.
    """

    task_vector: Callable[[int, int], Tensor]
    shape: tuple[int, int]
    squared_norms: Sequence[float]
    traces: Sequence[float]
    isotropy: float

    def solve(self) -> Solution:
        """Solve them in the cheaper of two exact forms."""
        primal, dual = operations(*self.shape, len(self.traces))
        return self._solve_primal() if primal <= dual else self._solve_dual()

    @property
    def _weights(self) -> list[tuple[int, float, float]]:
        """For each expert its number, the factor of τ_t τ_tᵀ in S_t, and λ_t ρ."""
        return [
            (t, trace * (1 - self.isotropy) / square, trace * self.isotropy)
            for t, (trace, square) in enumerate(zip(self.traces, self.squared_norms, strict=True))
        ]

    def _solve_primal(self) -> Solution:
        """M = A⁻¹ Σ_t S_t τ_t, where A is m x m."""
        m, n = self.shape
        like = self.task_vector(0, 0)
        total, gram = like.new_zeros(m, m), like.new_empty(m, m)
        right = like.new_zeros(n, m).T  # in LAPACK's layout, which saves a copy
        for t, factor, even in self._weights:
            tau = self.task_vector(t, 0)
            torch.mm(tau, tau.T, out=gram).diagonal().add_(even / m / factor)
            total.add_(gram, alpha=factor)
            right.addmm_(gram, tau, alpha=factor)
        del gram
        root = torch.linalg.cholesky(total)
        del total
        merged = torch.cholesky_solve(right, root)
        del right
        shares = []
        for t, factor, _ in self._weights:
            tau = self.task_vector(t, 0)
            # The transposed system, since LAPACK takes τ as it lies in memory.
            part = torch.linalg.solve_triangular(root.T, tau.T, upper=True, left=False)
            shares.append(factor * float(part.square_().sum()) / m)
        return merged, shares

    def _solve_dual(self) -> Solution:
        """The same with a matrix of size T n, which is cheaper if m is much larger than n.

        A = U Uᵀ + d I, where U puts the multiples of τ_t side by side and d = ρ/m. Every S_t τ_t
        is U W_t for some W_t, and A⁻¹ U = U (Uᵀ U + d I)⁻¹.
        """
        (m, n), count = self.shape, len(self.traces)
        like = self.task_vector(0, 0)
        inner, right = like.new_zeros(count * n, count * n), like.new_zeros(count * n, n)
        blocks, rights = inner.view(count, n, count, n), right.view(count, n, n)
        for t, factor, even in self._weights:
            tau = self.task_vector(t, 0)
            for other, its_factor, _ in self._weights[: t + 1]:
                product = tau.T @ (tau if other == t else self.task_vector(other, 1))
                blocks[t, :, other] = product.mul_(math.sqrt(factor * its_factor))
            rights[t] = blocks[t, :, t]
            rights[t].diagonal().add_(even / m)
            rights[t].div_(math.sqrt(factor))
        inner.diagonal().add_(self.isotropy / m)
        root = torch.linalg.cholesky(inner)  # it reads the lower triangle only
        del inner, blocks
        solved = torch.cholesky_solve(right, root).view(count, n, n)
        merged = like.new_zeros(m, n)
        for t, factor, _ in self._weights:
            merged.addmm_(self.task_vector(t, 0), solved[t], alpha=math.sqrt(factor))
        traces = torch.cholesky_inverse(root).diagonal().view(count, n).sum(1)
        return merged, ((n - self.isotropy / m * traces) / m).tolist()

    def solve_both_sides(self) -> Solution:
        """Solve Σ_t S_t (M − τ_t) + (M − τ_t) R_t = 0, a Sylvester equation A M + M B = C.

        R_t is S_t of the transposed matrix. M does not depend on which of the two is stored.
        """
        m, n = self.shape
        like = self.task_vector(0, 0)
        left, other, right = like.new_zeros(m, m), like.new_zeros(n, n), like.new_zeros(m, n)
        for t, factor, even in self._weights:
            tau = self.task_vector(t, 0)
            gram = tau @ tau.T
            gram.diagonal().add_(even / m / factor)
            left.add_(gram, alpha=factor)
            right.addmm_(gram, tau, alpha=factor)
            gram = tau.T @ tau
            gram.diagonal().add_(even / n / factor)
            other.add_(gram, alpha=factor)
            right.addmm_(tau, gram, alpha=factor)
        del gram
        (a, p), (b, q) = torch.linalg.eigh(left), torch.linalg.eigh(other)
        inverse = (a.unsqueeze(1) + b).reciprocal_()
        merged = p @ (p.T @ right @ q).mul_(inverse) @ q.T
        shares = []
        for t, factor, _ in self._weights:
            squares = (p.T @ self.task_vector(t, 0) @ q).square_()
            traces = squares.sum(1, keepdim=True) + squares.sum(0)
            shares.append(factor * float(traces.mul_(inverse).sum()) / (m * n))
        return merged, shares


def operations(m: int, n: int, experts: int) -> tuple[float, float]:
    """Return how many multiplications and additions the two exact forms of one matrix take.

    Args:
        m: the number of directions.
        n: the length of each row.
        experts: T.
    """
    primal = (5 * experts + 2) * m**2 * n + m**3 / 3
    size = experts * n
    dual = (experts + 3) * experts * m * n**2 + size**3 + 2 * size**2 * n
    return primal, dual


def costs_of_matrix(rows: int, columns: int, experts: int, side: str) -> tuple[float, int]:
    """Return what a matrix costs: operations, and float64 numbers held besides the experts.

    Args:
        rows: the number of rows of the stored matrix.
        columns: the number of its columns.
        experts: T.
        side: ``output``, ``input`` or ``both``.
    """
    m, n = (columns, rows) if side == "input" else (rows, columns)
    if side == "both":
        products = 6 * experts * m * n * (m + n) + 4 * m * n * (m + n)
        return products + 25 * (m**3 + n**3), 3 * (m**2 + n**2) + 3 * m * n
    primal, dual = operations(m, n, experts)
    if primal <= dual:
        return primal, 2 * m**2 + 2 * m * n
    return dual, 2 * (experts * n) ** 2 + experts * n**2 + 3 * m * n
