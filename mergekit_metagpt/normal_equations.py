"""Solvers of Σ_t S_t (M − τ_t) = 0 for one matrix; see :mod:`mergekit_metagpt.directions`.

Here S_t = λ_t [(1 − ρ) u_t u_tᵀ + (ρ/m) I], where u_t = τ_t / ‖τ_t‖ is m x n and Σ_t λ_t = 1.
Each solver returns M and, for each t, tr(A⁻¹ λ_t (1 − ρ) u_t u_tᵀ) / m with A = Σ_t S_t: what the
directed part of S_t has of all directions. All is float64, since an error of a float32 product
would grow by the condition number of A, up to m/ρ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Solution = tuple[Tensor, list[float]]


@dataclass(frozen=True)
class Equations:
    """The experts of a matrix that move, T of them.

    Attributes:
        unit: returns a new float64 tensor u_t, m x n, for t < T.
        shape: m and n.
        lengths: ‖τ_t‖, T positive floats.
        traces: λ_t, T positive floats that sum to 1.
        isotropy: ρ, above 0 and below 1.
    """

    unit: Callable[[int], Tensor]
    shape: tuple[int, int]
    lengths: Sequence[float]
    traces: Sequence[float]
    isotropy: float

    @property
    def weights(self) -> list[tuple[int, float, float, float]]:
        """For each expert its number, the factor of u_t u_tᵀ in S_t, λ_t ρ, and ‖τ_t‖."""
        return [
            (t, trace * (1 - self.isotropy), trace * self.isotropy, length)
            for t, (trace, length) in enumerate(zip(self.traces, self.lengths, strict=True))
        ]

    def solve(self) -> Solution:
        """Solve them in the cheaper of two exact forms."""
        primal, dual = operations(*self.shape, len(self.traces))
        return self._solve_primal() if primal <= dual else self._solve_dual()

    def _solve_primal(self) -> Solution:
        """M = A⁻¹ Σ_t S_t τ_t, where A is m x m."""
        m, n = self.shape
        like = self.unit(0)
        total, right = like.new_zeros(m, m), like.new_zeros(m, n)
        for t, directed, even, length in self.weights:
            u = self.unit(t)
            gram = u @ u.T
            total.add_(gram, alpha=directed)
            right.addmm_(gram, u, alpha=length * directed).add_(u, alpha=length * even / m)
        total.diagonal().add_(self.isotropy / m)
        factor = torch.linalg.cholesky(total)
        del total, gram
        shares = []
        for t, directed, _, _ in self.weights:
            part = torch.linalg.solve_triangular(factor, self.unit(t), upper=False)
            shares.append(directed * float(part.square_().sum()) / m)
        return torch.cholesky_solve(right, factor), shares

    def _solve_dual(self) -> Solution:
        """The same with a matrix of size T n, which is cheaper if m is much larger than n.

        A = U Uᵀ + d I, where U puts the √(λ_t (1 − ρ)) u_t side by side and d = ρ/m. Every
        S_t τ_t is U W_t for some W_t, and A⁻¹ U = U (Uᵀ U + d I)⁻¹.
        """
        (m, n), count = self.shape, len(self.traces)
        like = self.unit(0)
        inner, right = like.new_zeros(count * n, count * n), like.new_zeros(count * n, n)
        blocks, rights = inner.view(count, n, count, n), right.view(count, n, n)
        for t, directed, even, length in self.weights:
            own = self.unit(t).mul_(math.sqrt(directed))
            for other, weight, _, _ in self.weights[:t]:
                torch.mm(own.T, self.unit(other).mul_(math.sqrt(weight)), out=blocks[t, :, other])
            torch.mm(own.T, own, out=blocks[t, :, t])
            rights[t] = blocks[t, :, t]
            rights[t].diagonal().add_(even / m)
            rights[t].mul_(length / math.sqrt(directed))
        inner.diagonal().add_(self.isotropy / m)
        factor = torch.linalg.cholesky(inner)  # it reads the lower triangle only
        del inner, blocks
        solved = torch.cholesky_solve(right, factor).view(count, n, n)
        merged = like.zero_()
        for t, directed, _, _ in self.weights:
            merged.addmm_(self.unit(t), solved[t], alpha=math.sqrt(directed))
        traces = torch.cholesky_inverse(factor).diagonal().view(count, n).sum(1)
        return merged, ((n - self.isotropy / m * traces) / m).tolist()

    def solve_both_sides(self) -> Solution:
        """Solve Σ_t S_t (M − τ_t) + (M − τ_t) R_t = 0, a Sylvester equation A M + M B = C.

        R_t is S_t of the transposed matrix. Its result does not depend on which of the two is
        stored.
        """
        m, n = self.shape
        like = self.unit(0)
        left, other, right = like.new_zeros(m, m), like.new_zeros(n, n), like.new_zeros(m, n)
        for t, directed, even, length in self.weights:
            u = self.unit(t)
            gram = u @ u.T
            left.add_(gram, alpha=directed)
            right.addmm_(gram, u, alpha=length * directed)
            gram = u.T @ u
            other.add_(gram, alpha=directed)
            right.addmm_(u, gram, alpha=length * directed)
            right.add_(u, alpha=length * even * (1 / m + 1 / n))
        left.diagonal().add_(self.isotropy / m)
        other.diagonal().add_(self.isotropy / n)
        del gram
        (a, p), (b, q) = torch.linalg.eigh(left), torch.linalg.eigh(other)
        inverse = (a.unsqueeze(1) + b).reciprocal_()
        merged = p @ (p.T @ right @ q).mul_(inverse) @ q.T
        shares = []
        for t, directed, _, _ in self.weights:
            squares = (p.T @ self.unit(t) @ q).square_()
            traces = squares.sum(1, keepdim=True) + squares.sum(0)
            shares.append(directed * float(traces.mul_(inverse).sum()) / (m * n))
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
