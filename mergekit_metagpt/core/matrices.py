"""A tensor as matrices, each with a column for every input, and the experts that move there."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_metagpt.core.buffers import (
    ACCELERATOR_CHUNK,
    BLOCK,
    converted,
    room_for,
    where_possible,
)
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.core.task_vectors import in_float32_range

# Squared norms above this may overflow float32 in products with what is drawn.
_LARGEST = 1e36
# The product that is written is taken by so many parts of a block's rows, if they can be divided.
# So a core multiplies numbers that it has just subtracted; from another core's cache they take
# three times as long.
_ROW_PARTS = 8


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


class Block(NamedTuple):
    """Some rows of a matrix and of its task vectors; the next block overwrites it.

    Attributes:
        rows: which rows of the m x n matrix these are.
        base: their part of θ_0, rows x n.
        task_vectors: their part of τ_t, T x rows x n, contiguous.
        spare: room for the caller, rows x n.
    """

    rows: slice
    base: Tensor
    task_vectors: Tensor
    spare: Tensor

    def squares(self) -> Tensor:
        """Return the squared length of each row of each task vector, T x rows; uses ``spare``."""
        return torch.stack(
            [torch.mul(tau, tau, out=self.spare).sum(1) for tau in self.task_vectors]
        )

    def products(self) -> Tensor:
        """Return ⟨τ_t, τ_k⟩ over these rows, T x T."""
        count, _, n = self.task_vectors.shape
        if n < count**2:  # a product for each row would take more room than the rows
            flat = self.task_vectors.flatten(1)
            return flat @ flat.T
        by_row = self.task_vectors.transpose(0, 1)  # half the time of one product of long rows
        return torch.bmm(by_row, by_row.mT).sum(0)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right, rows x K and K x n, to ``spare``."""
        parts = 1 if len(left) % _ROW_PARTS else _ROW_PARTS
        target, left = (matrix.view(parts, -1, matrix.shape[1]) for matrix in (self.spare, left))
        target.baddbmm_(left, right.expand(parts, -1, -1))


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

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, some at a time, subtracted in the inputs' dtype."""
        m, n = self.base.shape
        count = len(self.experts) + 2
        limit = BLOCK if self.base.device.type == "cpu" else ACCELERATOR_CHUNK
        rows = max(1, limit // (count * n))
        rows = min(m, rows if rows < _ROW_PARTS else rows - rows % _ROW_PARTS)
        room = room_for(self.base, self.dtype, count * rows * n)
        for start in range(0, m, rows):
            part = slice(start, min(m, start + rows))
            size = part.stop - part.start
            origin, spare, *differences = parts = room[: count * size * n].view(count, size, n)
            origin.copy_(self.base[part])
            for difference, expert in zip(differences, self.experts, strict=True):
                torch.sub(converted(expert[part], difference), origin, out=difference)
            yield Block(part, origin, parts[2:], spare)

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
