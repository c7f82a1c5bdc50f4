"""Order statistics of a task vector's magnitudes, without sorting them.

R. W. Floyd and R. L. Rivest, "Expected time bounds for selection", CACM 18, 1975. Task vectors of
16-bit models have many equal magnitudes, so those that equal a limit are counted, not collected.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_metagpt.core.arrays import as_float32, at_place, count_of, in_order

# How far a place may be from that in a random sample. If it is farther, counting shows it.
_DEVIATIONS = 3


class OrderStatistic(NamedTuple):
    """A magnitude; in rising order, its equals are at ``[start:stop]``."""

    value: float
    start: int
    stop: int


def magnitudes_of(base: Tensor, expert: Tensor, chunk: int) -> Iterator[tuple[slice, Any]]:
    """Yield the magnitudes of a flat task vector in float32, so many at a time, and their places.

    On a CPU one core computes them and compares them. Numbers that it takes from another core's
    cache take three times as long.
    """
    for start in range(0, len(base), chunk):
        part = slice(start, start + chunk)
        yield part, _magnitudes(base[part], expert[part])


def _magnitudes(base: Tensor, expert: Tensor) -> Any:
    return abs(as_float32(expert) - as_float32(base))


def order_statistics(
    base: Tensor, expert: Tensor, places: Sequence[int], chunk: int
) -> Sequence[OrderStatistic]:
    """Return the magnitudes of a task vector at some places of their rising order.

    Each is looked for between two limits that a sample suggests. Counting shows whether it is
    there; only what lies between is put in order.

    Args:
        base: θ_0, flat.
        expert: θ_t, flat, of the same size and device.
        places: of which 0 is that of the smallest.
        chunk: how many numbers are worked on at a time.
    """
    for limits in (_limits(base, expert, places), [(-1.0, math.inf)] * len(places)):
        searches = [_Search(place, *pair) for place, pair in zip(places, limits, strict=True)]
        for _, magnitudes in magnitudes_of(base, expert, chunk):
            for search in searches:
                search.add(magnitudes)
        found = [search.found() for search in searches]
        if None not in found:
            break
    return [it for it in found if it]


class _Search:
    """Looks for the magnitude at a place of the rising order between two limits."""

    def __init__(self, place: int, low: float, high: float) -> None:
        self.place, self.low, self.high = place, low, high
        self.smaller = self.to_low = self.to_high = 0  # how many are < low, <= low, <= high
        self.between: list[Any] = []

    def add(self, magnitudes: Any) -> None:
        """Count a chunk."""
        beyond = magnitudes > self.low
        self.smaller += len(magnitudes) - count_of(magnitudes >= self.low)
        self.to_low += len(magnitudes) - count_of(beyond)
        self.to_high += count_of(magnitudes <= self.high)
        beyond &= magnitudes < self.high
        self.between.append(magnitudes[beyond])

    def found(self) -> OrderStatistic | None:
        """Return what is at the place, or None if it is beyond the limits."""
        library: Any = np if isinstance(self.between[0], np.ndarray) else torch
        between = library.concatenate(self.between)
        to_high = self.to_low + len(between)  # how many are < high, if it is not low
        if not self.smaller <= self.place < self.to_high:
            return None
        if self.place < self.to_low:
            return OrderStatistic(self.low, self.smaller, self.to_low)
        if self.place >= to_high:
            return OrderStatistic(self.high, to_high, self.to_high)
        value = at_place(between, self.place - self.to_low)
        start = self.to_low + count_of(between < value)
        return OrderStatistic(value, start, start + count_of(between == value))


def _limits(base: Tensor, expert: Tensor, places: Sequence[int]) -> list[tuple[float, float]]:
    """Return two limits around the magnitude at each place, guessed from a sample."""
    size, count = len(base), int(len(base) ** (2 / 3))
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(size, (count,), generator=generator, device="cpu").to(base.device)
    sample = in_order(_magnitudes(base[drawn], expert[drawn]))
    limits = []
    for share in (place / size for place in places):
        margin = 2 + _DEVIATIONS * math.sqrt(count * share * (1 - share))
        first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
        low = float(sample[first]) if first >= 0 else -1.0
        limits.append((low, float(sample[last]) if last < count else math.inf))
    return limits
