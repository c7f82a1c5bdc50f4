"""A tensor as matrices, each with a column for every input, and the experts that move there."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_metagpt.core.buffers import where_possible
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.core.task_vectors import Block, blocks, in_float32_range, squared_norms

# Squared norms above this may overflow float32 in products with what is drawn.
_LARGEST = 1e36


def matrices_of(tensor: Tensor, role: Role) -> list[Tensor]:
    """Return views of a tensor's matrices, each with a column for every input.

    A table is one matrix of its rows; each single element is a row.
    """
    if role is Role.ELEMENTS:
        return [tensor.reshape(-1, 1)]
    if role is Role.ROWS:
        return [tensor.reshape(len(tensor), -1)]
    stack = list(tensor.reshape(-1, *tensor.shape[-2:]))
    return [matrix.T for matrix in stack] if role is Role.TRANSPOSED else stack


@dataclass(frozen=True)
class MatrixInputs:
    """θ_0 and θ_t of a matrix, in any dtype; the dtype to calculate in; a seed to draw with."""

    base: Tensor
    experts: Sequence[Tensor]
    dtype: torch.dtype
    seed: int

    def widened(self) -> "MatrixInputs":
        """Return the inputs to calculate with in float64; an error if that is so already."""
        if self.dtype == torch.float64:
            raise FloatingPointError("A number is not finite, or too large to be squared.")
        base, *experts = where_possible(torch.float64, self.base, *self.experts)
        return MatrixInputs(base, experts, torch.float64, self.seed)

    def movers(self, priors: Sequence[float]) -> list[int]:
        """Return which experts differ from the base and have a prior."""
        pairs = enumerate(zip(priors, self.experts, strict=True))
        return [t for t, (w, expert) in pairs if w and not torch.equal(self.base, expert)]

    def of(self, experts: Sequence[int]) -> "MatrixInputs":
        """Return the inputs with some of the experts."""
        return replace(self, experts=[self.experts[t] for t in experts])

    def copy_of(self, rows: Tensor) -> "MatrixInputs":
        """Return a copy of some of the rows, as inputs."""
        rows = rows.to(self.base.device)
        return replace(
            self, base=self.base[rows], experts=[expert[rows] for expert in self.experts]
        )

    def norms_of_others(self, movers: Sequence[int]) -> list[float]:
        """Return ‖τ_t‖² of experts that take no part, and 0 for those that do."""
        others = enumerate(self.experts)
        return [0.0 if t in movers else squared_norms(self.base, [e])[0] for t, e in others]

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, some at a time."""
        return blocks(self.base, self.experts, self.dtype)

    def row_norms(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the squares of each block's rows, T x rows, together: T x m float64.

        A FloatingPointError says that they are out of the dtype's range.
        """
        by_row = torch.cat(list(squares), dim=1).cpu().double()
        size, is_exact = self.base.numel(), self.dtype == torch.float64
        for norm in by_row.sum(1).tolist():
            is_right = in_float32_range(norm, size) and norm < _LARGEST
            if not (math.isfinite(norm) if is_exact else is_right):
                raise FloatingPointError(f"A squared norm is {norm} in {self.dtype}.")
        return by_row
