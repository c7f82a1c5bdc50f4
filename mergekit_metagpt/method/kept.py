"""What is left of a task vector, applied to one chunk after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from mergekit_metagpt.method.selection import Indices

# So many numbers stay in a core's own cache, and torch divides them among its threads. Python's own
# threads would wait for each other after every operation, and cost more than they gain.
_CHUNK = 1 << 18
# Five or more experts are summed in an order that differs for the numbers beyond the last block of
# up to 128. So chunks hold a multiple of that, and the last one is not smaller.
_STEP = 128


@dataclass(frozen=True)
class Bound:
    """A magnitude where numbers begin to be dropped, and which of those that equal it are kept.

    Attributes:
        magnitude: the least or the largest one that is kept.
        exceptions: the indices, rising, of the numbers of this magnitude that are not treated as
            the others of it.
    """

    magnitude: float
    exceptions: Indices

    def within(self, start: int, count: int) -> Indices:
        """Return the exceptions in a chunk, counted from its start."""
        first, last = np.searchsorted(self.exceptions, [start, start + count])
        return self.exceptions[first:last] - start


@dataclass(frozen=True)
class Kept:
    """What is left of a task vector.

    Attributes:
        mask: a flat int8 for each number, 1 or 0; None if magnitudes decide.
        least: numbers of this magnitude or less are dropped, but for its exceptions; None if none.
        most: numbers of a larger magnitude are dropped, and its exceptions; None if none.
        factor: what the kept numbers are multiplied by, a float32 scalar; None if nothing.
    """

    mask: Tensor | None = None
    least: Bound | None = None
    most: Bound | None = None
    factor: Tensor | None = None

    def apply(self, delta: Tensor, start: int) -> None:
        """Sparsify a flat chunk of the task vector, from an index on, in place.

        A number that is dropped may become 0.0 where MergeKit has -0.0.
        """
        count = len(delta)
        if self.mask is not None:
            delta.mul_(self.mask[start : start + count])
        if self.least is not None:
            places = self.least.within(start, count)
            restored = delta.numpy()[places]
            hardshrink(delta, self.least.magnitude, out=delta)
            delta.numpy()[places] = restored
        if self.most is not None:
            delta -= hardshrink(delta, self.most.magnitude)
            delta.numpy()[self.most.within(start, count)] = 0
        if self.factor is not None:
            delta.mul_(self.factor)


def chunks_of(base: Tensor, experts: int) -> list[slice]:
    """Return how a flat tensor is divided, so that a chunk of all experts is small."""
    size = max(_STEP, _CHUNK // experts // _STEP * _STEP)
    starts = range(0, max(1, base.numel() - _STEP + 1), size)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], base.numel()], strict=True)]


def deltas(
    chunks: Sequence[slice], base: Tensor, *experts: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the base (n) and the T task vectors (T, n) of each chunk, flat and in float32.

    The next chunk overwrites them.
    """
    flat = [tensor.detach().view(-1) for tensor in (base, *experts)]
    largest = max(chunk.stop - chunk.start for chunk in chunks)
    room = base.new_empty(len(flat) * largest, dtype=torch.float32)
    for chunk in chunks:
        count = chunk.stop - chunk.start
        rows = room[: len(flat) * count].view(len(flat), count)
        for row, tensor in zip(rows, flat, strict=True):
            row.copy_(tensor[chunk])
        yield chunk, rows[0], rows[1:].sub_(rows[0])
