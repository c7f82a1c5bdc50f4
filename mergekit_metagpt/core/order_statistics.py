"""Order statistics of the magnitudes of task vectors, without sorting them.

R. W. Floyd and R. L. Rivest, "Expected time bounds for selection", CACM 18, 1975. Task vectors of
16-bit models have many equal magnitudes, most of them 0, so those that equal the lower limit are
counted, not collected.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_metagpt.core.arrays import as_array, at_place, count_of, in_order, library_of
from mergekit_metagpt.core.task_vectors import deltas_of

# How far a place may be from that in a random sample. If it is farther, counting shows it.
_DEVIATIONS = 3

Limits = tuple[float, float]


class OrderStatistic(NamedTuple):
    """A magnitude, and where its equals are."""

    value: float
    start: int  # of its equals in rising order
    equals: Sequence[int]  # how many each chunk has

    @property
    def stop(self) -> int:
        """The end of its equals in rising order."""
        return self.start + sum(self.equals)

    def first_within(self, places: range) -> list[int]:
        """Return how many equals of each chunk are the first in memory that fill those places."""
        left, counts = min(self.stop, places.stop) - max(self.start, places.start), []
        for equals in self.equals:
            counts.append(min(equals, left))
            left -= counts[-1]
        return counts


def order_statistics(
    base: Tensor,
    experts: Sequence[Tensor],
    chunks: Sequence[slice],
    places: Sequence[Sequence[int]],
) -> list[list[OrderStatistic]]:
    """Return the magnitudes at some places of the rising order of each task vector's.

    Each is looked for between two limits that a sample suggests. Counting shows whether it is
    there; only what lies between is put in order.

    Args:
        base: θ_0, flat.
        experts: θ_t, T flat tensors of the same length and device.
        chunks: parts of them to work on at a time.
        places: some of each expert; 0 is that of the smallest.
    """
    limits = _limits(base, experts, places)
    found = _between(base, experts, chunks, places, limits)
    for t, its in enumerate(found):
        if None in its:  # this sample has misled
            anywhere = [(0.0, math.inf)] * len(its)
            [found[t]] = _between(base, [experts[t]], chunks, [places[t]], [anywhere])
    return [[it for it in its if it] for its in found]


def _limits(
    base: Tensor, experts: Sequence[Tensor], places: Sequence[Sequence[int]]
) -> list[list[Limits]]:
    """Return two limits around the magnitude at each place, guessed from a random sample."""
    size, generator = len(base), torch.Generator("cpu").manual_seed(0)
    count = int(size ** (2 / 3))
    drawn = torch.randint(size, (count,), generator=generator, device="cpu").to(base.device)
    sampled = next(deltas_of(base[drawn], [e[drawn] for e in experts], [slice(0, count)]))[1]
    samples = in_order(as_array(sampled.abs_()))
    return [
        [_around(s, place / size) for place in its] for s, its in zip(samples, places, strict=True)
    ]


def _around(sample: Any, share: float) -> Limits:
    """Return the limits in a rising sample, of which a share is below the wanted magnitude."""
    count = len(sample)
    margin = 2 + _DEVIATIONS * math.sqrt(count * share * (1 - share))
    first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
    low = float(sample[first]) if first >= 0 else 0.0
    return low, float(sample[last]) if last < count else math.inf


def _between(
    base: Tensor,
    experts: Sequence[Tensor],
    chunks: Sequence[slice],
    places: Sequence[Sequence[int]],
    limits: Sequence[Sequence[Limits]],
) -> list[list[OrderStatistic | None]]:
    """Look for each place of some experts between two limits; None if it is beyond them."""
    counts: list[list[list[_Counts]]] = [[[] for _ in its] for its in limits]
    for _, deltas in deltas_of(base, experts, chunks):
        for its, pairs, parts in zip(deltas.abs_(), limits, counts, strict=True):
            for pair, part in zip(pairs, parts, strict=True):
                part.append(_counted(as_array(its), *pair))
    return [
        [_found(*it) for it in zip(*each, strict=True)]
        for each in zip(places, limits, counts, strict=True)
    ]


class _Counts(NamedTuple):
    """Of a chunk: how many magnitudes are below the lower limit, or equal to it; and those beyond.

    Attributes:
        beyond: up to the upper limit, that included.
    """

    below: int
    equal: int
    beyond: Any


def _counted(its: Any, low: float, high: float) -> _Counts:
    below, beyond = count_of(its < low), its > low
    equal = len(its) - below - count_of(beyond)
    beyond &= its <= high
    return _Counts(below, equal, its[beyond])


def _found(place: int, limits: Limits, counts: Sequence[_Counts]) -> OrderStatistic | None:
    below = sum(chunk.below for chunk in counts)
    lowest = OrderStatistic(limits[0], below, [chunk.equal for chunk in counts])
    if lowest.start <= place < lowest.stop:
        return lowest
    parts = [chunk.beyond for chunk in counts]
    beyond = library_of(parts[0]).concatenate(parts)
    if not 0 <= place - lowest.stop < len(beyond):
        return None
    value = at_place(beyond, place - lowest.stop)
    start = lowest.stop + count_of(beyond < value)
    return OrderStatistic(value, start, [count_of(part == value) for part in parts])
