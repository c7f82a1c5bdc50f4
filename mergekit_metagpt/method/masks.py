"""What MergeKit's sparsification methods keep of a task vector, without sorting all of it.

Each mask is, bit for bit, the one that ``mergekit.sparsify`` makes of the whole float32 task
vector on the CPU, from the same random numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.method.selection import Pairs, fill_pairs, follows_torch, indices_between

# torch wakes other threads for operations on 2^15 numbers or more. Chunks are smaller: they stay in
# a core's own cache, and waking a thread takes longer than an operation on one.
_CHUNK = (1 << 15) - 1
# Five or more experts are summed in an order that differs for the numbers beyond the last block of
# up to 128. So chunks hold a multiple of that, and the last one is not smaller.
_STEP = 128
# Numbers in the rows that are sorted at a time.
_SORTED = 1 << 20
# MergeKit does not rescale a task vector whose sums are smaller.
_LEAST_SUM = 1e-7


class OnlyMergeKitKnowsError(Exception):
    """A mask cannot be told without MergeKit's own code; no random number was drawn for it."""


@dataclass(frozen=True)
class Kept:
    """What is left of a task vector.

    Attributes:
        mask: a flat int8 for each number, 1 or 0; None if all are kept.
        factor: what the kept numbers are multiplied by, a float32 scalar; None if nothing.
    """

    mask: Tensor | None = None
    factor: Tensor | None = None

    def of(self, delta: Tensor, start: int) -> Tensor:
        """Return a flat chunk of the task vector, from an index on, sparsified in place."""
        if self.mask is not None:
            delta.mul_(self.mask[start : start + len(delta)])
        return delta if self.factor is None else delta.mul_(self.factor)


def deltas(base: Tensor, *experts: Tensor) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yield the first index, the base and the task vectors of each chunk, flat and in float32."""
    flat = [tensor.detach().view(-1) for tensor in (base, *experts)]
    size = max(_STEP, _CHUNK // len(experts) // _STEP * _STEP)
    starts = range(0, max(1, base.numel() - _STEP + 1), size)
    for start, stop in zip(starts, [*starts[1:], base.numel()], strict=True):
        origin, *chunks = (tensor[start:stop].float() for tensor in flat)
        yield start, origin, [chunk - origin for chunk in chunks]


class Masks:
    """The masks of the task vectors of one base, with room that all of them share.

    Attributes:
        base: θ_0, contiguous and on the CPU, of a dtype that float32 holds.
    """

    def __init__(self, base: Tensor) -> None:
        self.base = base

    def kept(
        self,
        method: SparsificationMethod | None,
        expert: Tensor,
        density: float,
        rescale: bool,
        gamma: float = 0.0,
        epsilon: float = 0.0,
    ) -> Kept:
        """Return what ``mergekit.sparsify.sparsify`` keeps of θ_t − θ_0.

        Args:
            method: how numbers are chosen.
            expert: θ_t, like the base.
            density: the share of numbers to keep.
            rescale: whether to multiply them so that the sum of magnitudes stays as it was.
            gamma: the share of the largest numbers that ``magnitude_outliers`` drops.
            epsilon: how far ``della_magprune`` goes from the density.

        Raises:
            OnlyMergeKitKnowsError: if the method is another one, or torch sorts otherwise.
        """
        size = self.base.numel()
        if density >= 1:
            return Kept()
        if method == SparsificationMethod.random:
            mask = self._drawn(density)
        elif method == SparsificationMethod.magnitude:
            count = max(1, int(density * size)) if density > 0 else 0
            mask = self._sorted_between(expert, 0, count, descending=True)
        elif method == SparsificationMethod.magnitude_outliers:
            count = int(density * size)
            start = max(0, size - count - int(gamma * size))
            mask = self._sorted_between(expert, start, start + count, descending=False)
        elif method == SparsificationMethod.della_magprune:
            mask = self._drawn_by_rank(expert, density, epsilon)
        else:
            raise OnlyMergeKitKnowsError
        return Kept(mask, self._factor(expert, mask) if rescale else None)

    @cached_property
    def _pairs(self) -> Pairs:
        return np.empty(self.base.numel(), np.int64)

    @cached_property
    def _magnitudes(self) -> Tensor:
        return torch.empty_like(self.base, dtype=torch.float32)

    def _none(self) -> Tensor:
        return torch.zeros(self.base.numel(), dtype=torch.int8, device="cpu")

    def _sorted_between(self, expert: Tensor, start: int, stop: int, descending: bool) -> Tensor:
        """Return the mask of the numbers that a sort by magnitude puts at ``[start:stop]``."""
        mask = self._none()
        if stop > start:
            if not follows_torch():
                raise OnlyMergeKitKnowsError
            for first, _, (delta,) in deltas(self.base, expert):
                pairs = self._pairs[first : first + len(delta)]
                fill_pairs(pairs, delta.abs_().numpy(), first, descending)
            chosen = indices_between(self._pairs, start, stop)
            if chosen is None:
                raise OnlyMergeKitKnowsError
            mask.numpy()[chosen] = 1
        return mask

    def _drawn(self, density: float) -> Tensor:
        """Return a mask that keeps each number with the same probability."""
        mask = torch.empty(self.base.numel(), dtype=torch.int8, device="cpu")
        probabilities = torch.full((_CHUNK,), density, dtype=torch.float32, device="cpu")
        for start in range(0, len(mask), _CHUNK):
            chunk = mask[start : start + _CHUNK]
            _draw(chunk, probabilities[: len(chunk)])
        return mask

    def _drawn_by_rank(self, expert: Tensor, density: float, epsilon: float) -> Tensor:
        """Return a mask that is more likely to keep a number, the larger it is in its row."""
        if density <= 0:
            return self._none()
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise OnlyMergeKitKnowsError  # it has a sentence for this
        shape = self.base.shape if self.base.dim() > 1 else (1, self.base.numel())
        base, expert = (tensor.detach().view(shape) for tensor in (self.base, expert))
        mask = torch.empty(shape, dtype=torch.int8, device="cpu")
        by_rank = _probabilities_by_rank(shape[1], density, epsilon)
        by_rank = by_rank.view(1, -1, *[1] * (len(shape) - 2))
        count = max(1, _SORTED // base[0].numel())
        for start in range(0, len(base), count):
            rows = slice(start, start + count)
            order = (expert[rows].float() - base[rows].float()).abs_().argsort(dim=1)
            probabilities = torch.empty(order.shape, dtype=torch.float32, device="cpu")
            probabilities.scatter_(1, order, by_rank.expand_as(order))
            _draw(mask[rows], probabilities)
        return mask.view(-1)

    def _factor(self, expert: Tensor, mask: Tensor) -> Tensor | None:
        """Return ‖τ‖₁ divided by what is left of it; None if MergeKit does not rescale.

        A sum in float32 depends on how torch divides it, so both are over the whole tensor.
        """
        flat = self._magnitudes.view(-1)
        for start, _, (delta,) in deltas(self.base, expert):
            flat[start : start + len(delta)] = delta.abs_()
        before = self._magnitudes.sum()
        for start in range(0, len(flat), _CHUNK):
            Kept(mask).of(flat[start : start + _CHUNK], start)
        after = self._magnitudes.sum()
        return None if before < _LEAST_SUM or after < _LEAST_SUM else before / after


def _probabilities_by_rank(count: int, density: float, epsilon: float) -> Tensor:
    """Return with which probability DELLA keeps each number of a row, the smallest first."""
    ranks = torch.arange(count, device="cpu").float() + 1
    least, most = ranks.min(), ranks.max()
    return (density - epsilon) + ((ranks - least) / (most - least)).clamp(0, 1) * 2 * epsilon


def _draw(mask: Tensor, probabilities: Tensor) -> None:
    """Write 1 with these probabilities, as ``torch.bernoulli`` does, or else 0."""
    if _uniform_below_is_bernoulli():
        uniform = torch.rand(probabilities.shape, dtype=torch.float32, device="cpu")
        torch.lt(uniform, probabilities, out=mask)
    else:
        mask.bernoulli_(probabilities)


@cache
def _uniform_below_is_bernoulli() -> bool:
    """Return whether ``rand``, which is 3 times as fast, uses a generator as ``bernoulli`` does."""
    first, second = (torch.Generator("cpu").manual_seed(1) for _ in range(2))
    for size in (10, 3000):
        probabilities = torch.linspace(0, 1, size, dtype=torch.float32, device="cpu")
        uniform = torch.rand(size, generator=second, dtype=torch.float32, device="cpu")
        drawn = torch.bernoulli(probabilities, generator=first)
        if not torch.equal(uniform < probabilities, drawn.bool()):
            return False
    return torch.equal(first.get_state(), second.get_state())
