"""What MergeKit's sparsification methods keep of a task vector, without sorting all of it.

It is, number for number, what ``mergekit.sparsify`` keeps of the whole float32 task vector on the
CPU, from the same random numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import torch
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.method.kept import Bound, Kept, chunks_of, deltas
from mergekit_metagpt.method.selection import (
    Cut,
    Pairs,
    cuts,
    fill_pairs,
    follows_torch,
)

# Numbers in the rows that are sorted at a time.
_SORTED = 1 << 20
# MergeKit does not rescale a task vector whose sums are smaller.
_LEAST_SUM = 1e-7


class OnlyMergeKitKnowsError(Exception):
    """A mask cannot be told without MergeKit's own code; no random number was drawn for it."""


_ALL = Kept()
_NOTHING = Kept(least=Bound(math.inf, np.empty(0, np.int64)))


class Masks:
    """What is kept of the task vectors of one base, one after the other.

    Attributes:
        base: θ_0, contiguous and on the CPU, of a dtype that float32 holds.
    """

    def __init__(self, base: Tensor) -> None:
        self.base = base

    @cached_property
    def _pairs(self) -> Pairs:
        """Room for the pairs of one task vector after the other: new memory takes time."""
        return np.empty(self.base.numel(), np.int64)

    @cached_property
    def _magnitudes(self) -> Tensor:
        """Room for the magnitudes of one task vector after the other."""
        return torch.empty(self.base.shape, dtype=torch.float32, device="cpu")

    def kept(
        self,
        method: SparsificationMethod | None,
        expert: Tensor,
        density: float,
        gamma: float = 0.0,
        epsilon: float = 0.0,
    ) -> Kept:
        """Return what ``mergekit.sparsify.sparsify`` keeps of θ_t − θ_0.

        Args:
            method: how numbers are chosen.
            expert: θ_t, like the base.
            density: the share of numbers to keep.
            gamma: the share of the largest numbers that ``magnitude_outliers`` drops.
            epsilon: how far ``della_magprune`` goes from the density.

        Raises:
            OnlyMergeKitKnowsError: if the method is another one, or torch sorts otherwise.
        """
        size = self.base.numel()
        if density >= 1:
            return _ALL
        if method == SparsificationMethod.random:
            return self._drawn(density)
        if method == SparsificationMethod.magnitude:
            return self._largest(expert, max(1, int(density * size)) if density > 0 else 0)
        if method == SparsificationMethod.magnitude_outliers:
            count = int(density * size)
            start = max(0, size - count - int(gamma * size))
            return self._between(expert, start, start + count)
        if method == SparsificationMethod.della_magprune:
            return self._drawn_by_rank(expert, density, epsilon)
        raise OnlyMergeKitKnowsError

    def rescaled(self, kept: Kept, expert: Tensor) -> Kept:
        """Return what is kept, multiplied so that the sum of magnitudes stays ‖τ‖₁.

        A sum in float32 depends on how torch divides it, so both are over the whole tensor.
        """
        if kept is _ALL:
            return kept
        chunks = chunks_of(self.base, 1)
        magnitudes = self._magnitudes
        flat = magnitudes.view(-1)
        for chunk, _, [delta] in deltas(chunks, self.base, expert):
            flat[chunk] = delta.abs_()
        before = magnitudes.sum()
        for chunk in chunks:
            kept.apply(flat[chunk], chunk.start)
        after = magnitudes.sum()
        if before < _LEAST_SUM or after < _LEAST_SUM:
            return kept
        return replace(kept, factor=before / after)

    def _largest(self, expert: Tensor, count: int) -> Kept:
        """Return what is kept if it is the first numbers of a falling sort by magnitude."""
        if count == 0:
            return _NOTHING
        [cut] = self._cuts(expert, [count], descending=True)
        return Kept(least=Bound(cut.magnitude, cut.before) if cut else None)

    def _between(self, expert: Tensor, start: int, stop: int) -> Kept:
        """Return what is kept if a rising sort by magnitude puts it at ``[start:stop]``."""
        if start == stop:
            return _NOTHING
        first, last = self._cuts(expert, [start, stop], descending=False)
        return Kept(
            least=Bound(first.magnitude, first.behind) if first else None,
            most=Bound(last.magnitude, last.behind) if last else None,
        )

    def _cuts(self, expert: Tensor, places: Sequence[int], descending: bool) -> list[Cut | None]:
        """Return how a sort by magnitude cuts the numbers; None where all are on one side."""
        inside = [place for place in places if 0 < place < self.base.numel()]
        if not inside:
            return [None] * len(places)
        if not follows_torch():
            raise OnlyMergeKitKnowsError
        pairs = self._pairs
        for chunk, _, [delta] in deltas(chunks_of(self.base, 1), self.base, expert):
            fill_pairs(pairs[chunk], delta.abs_().numpy(), chunk.start, descending)
        found = cuts(pairs, inside)
        if found is None:
            raise OnlyMergeKitKnowsError
        by_place = dict(zip(inside, found, strict=True))
        return [by_place.get(place) for place in places]

    def _drawn(self, density: float) -> Kept:
        """Return what is drawn if all numbers have the same probability."""
        mask = torch.empty(self.base.numel(), dtype=torch.int8, device="cpu")
        for chunk in chunks_of(self.base, 1):
            probabilities = torch.full_like(mask[chunk], density, dtype=torch.float32)
            _draw(mask[chunk], probabilities)
        return Kept(mask)

    def _drawn_by_rank(self, expert: Tensor, density: float, epsilon: float) -> Kept:
        """Return what is drawn if a number is more likely to be, the larger it is in its row."""
        if density <= 0:
            return _NOTHING
        if density + epsilon >= 1 or density - epsilon <= 0:
            raise OnlyMergeKitKnowsError  # it has a sentence for this
        shape = self.base.shape if self.base.dim() > 1 else (1, self.base.numel())
        base, expert = (tensor.detach().view(shape) for tensor in (self.base, expert))
        mask = torch.empty(base.shape, dtype=torch.int8, device="cpu")
        by_rank = _probabilities_by_rank(shape[1], density, epsilon)
        by_rank = by_rank.view(1, -1, *[1] * (len(shape) - 2))
        count = max(1, _SORTED // base[0].numel())
        for start in range(0, len(base), count):
            rows = slice(start, start + count)
            order = (expert[rows].float() - base[rows].float()).abs_().argsort(dim=1)
            probabilities = torch.empty(order.shape, dtype=torch.float32, device="cpu")
            probabilities.scatter_(1, order, by_rank.expand_as(order))
            _draw(mask[rows], probabilities)
        return Kept(mask.view(-1))


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
