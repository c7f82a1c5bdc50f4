"""Order statistics of the magnitudes of task vectors, without sorting them.

R. W. Floyd and R. L. Rivest, "Expected time bounds for selection", CACM 18, 1975. Task vectors of
16-bit models have many equal magnitudes, so those that equal a limit are counted, not collected.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_metagpt.core.arrays import (
    as_array,
    as_bits,
    as_float32,
    at_place,
    count_of,
    in_order,
    library_of,
    on_all_cores,
)
from mergekit_metagpt.core.buffers import Room

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

    def within(self, start: int, stop: int) -> list[int]:
        """Return how many equals of each chunk to keep, so that those from start to stop are kept.

        The first in memory are kept. At least one is.
        """
        left, counts = min(self.stop, stop) - max(self.start, start), []
        for equals in self.equals:
            counts.append(min(equals, left))
            left -= counts[-1]
        return counts


class Magnitudes:
    """The magnitudes of T flat task vectors in float32, some at a time.

    On a CPU they are NumPy arrays in a room: the next call overwrites them, and the next flags of
    the same number overwrite those.

    Attributes:
        device: of the tensors.
        size: how many numbers a task vector has.
        chunks: parts of it to work on at a time.
    """

    def __init__(self, base: Tensor, experts: Sequence[Tensor], chunks: Sequence[slice]) -> None:
        """Take θ_0 and T θ_t, flat, on the same device."""
        self.device, self.size, self.chunks = base.device, len(base), chunks
        self._start, *self._ends = map(as_bits, (base, *experts))
        self._library = library_of(self._start)

    def of(self, expert: int, places: Any, room: Room) -> Any:
        """Return the magnitudes of an expert at some places: a slice, or an array."""
        start, end = self._start[places], self._ends[expert][places]
        if self._library is torch:
            return (end.float() - start.float()).abs_()
        room.fit(len(start))
        result, other = room.numbers[:, : len(start)]
        with np.errstate(over="ignore"):  # a difference beyond float32 counts as infinite
            np.subtract(as_float32(end, result), as_float32(start, other), out=result)
        return np.abs(result, out=result)

    def flags(self, comparison: str, its: Any, value: float, room: Room, number: int = 0) -> Any:
        """Return which magnitudes are ``less``, ``greater``, … than a value."""
        out = None if self._library is torch else room.flags[number, : len(its)]
        return getattr(self._library, comparison)(its, value, out=out)

    def sample(self, expert: int, room: Room) -> Any:
        """Return the magnitudes at random places, in rising order."""
        generator = torch.Generator("cpu").manual_seed(0)
        count = int(self.size ** (2 / 3))
        drawn = torch.randint(self.size, (count,), generator=generator, device="cpu")
        return in_order(self.of(expert, as_array(drawn.to(self.device)), room))


def order_statistics(
    magnitudes: Magnitudes, places: Sequence[Sequence[int]]
) -> list[list[OrderStatistic]]:
    """Return for each expert the magnitudes at some places of their rising order.

    Each is looked for between two limits that a sample suggests. Counting shows whether it is
    there; only what lies between is put in order. Place 0 is that of the smallest.
    """
    experts = range(len(places))
    limits = on_all_cores(
        lambda t, room: _limits(magnitudes.sample(t, room), magnitudes.size, places[t]),
        experts,
        magnitudes.device,
    )
    found = _between(magnitudes, experts, places, limits)
    for t, its in enumerate(found):
        if None in its:  # this sample has misled
            anywhere = [(-1.0, math.inf)] * len(its)
            [found[t]] = _between(magnitudes, [t], [places[t]], [anywhere])
    return [[it for it in its if it] for its in found]


def _limits(sample: Any, size: int, places: Sequence[int]) -> list[Limits]:
    """Return two limits around the magnitude at each place, guessed from a sample in order."""
    limits, count = [], len(sample)
    for share in (place / size for place in places):
        margin = 2 + _DEVIATIONS * math.sqrt(count * share * (1 - share))
        first, last = math.floor(share * count - margin), math.ceil(share * count + margin)
        low = float(sample[first]) if first >= 0 else -1.0
        limits.append((low, float(sample[last]) if last < count else math.inf))
    return limits


def _between(
    magnitudes: Magnitudes,
    experts: Sequence[int],
    places: Sequence[Sequence[int]],
    limits: Sequence[Sequence[Limits]],
) -> list[list[OrderStatistic | None]]:
    """Look for each place of some experts between two limits; None if it is beyond them."""

    def counted(part: tuple[tuple[int, Sequence[Limits]], slice], room: Room) -> list[_Counts]:
        (expert, pairs), chunk = part
        return _counted(magnitudes.of(expert, chunk, room), magnitudes, pairs, room)

    parts = list(product(zip(experts, limits, strict=True), magnitudes.chunks))
    counts = on_all_cores(counted, parts, magnitudes.device)
    length, found = len(magnitudes.chunks), []
    for number, (its, pairs) in enumerate(zip(places, limits, strict=True)):
        by_place = zip(*counts[number * length : (number + 1) * length], strict=True)
        found.append([_found(*each) for each in zip(its, pairs, by_place, strict=True)])
    return found


class _Counts(NamedTuple):
    """Of a chunk: how many are below the lower limit, equal to it and to the upper; and between."""

    below: int
    low: int
    between: Any
    high: int


def _counted(
    its: Any, magnitudes: Magnitudes, limits: Sequence[Limits], room: Room
) -> list[_Counts]:
    counts = []
    for low, high in limits:
        below = count_of(magnitudes.flags("less", its, low, room))
        inside = magnitudes.flags("greater", its, low, room, number=1)
        at_low = len(its) - below - count_of(inside)
        to_high = count_of(magnitudes.flags("less_equal", its, high, room))
        below_high = magnitudes.flags("less", its, high, room)
        at_high = to_high - count_of(below_high) if low < high else 0
        inside &= below_high
        counts.append(_Counts(below, at_low, its[inside], at_high))
    return counts


def _found(place: int, limits: Limits, counts: Sequence[_Counts]) -> OrderStatistic | None:
    parts = [chunk.between for chunk in counts]
    between = library_of(parts[0]).concatenate(parts)
    before = sum(chunk.below for chunk in counts)
    at_low = OrderStatistic(limits[0], before, [chunk.low for chunk in counts])
    to_high = at_low.stop + len(between)
    at_high = OrderStatistic(limits[1], to_high, [chunk.high for chunk in counts])
    for end in (at_low, at_high):
        if end.start <= place < end.stop:
            return end
    if not at_low.stop <= place < to_high:
        return None
    value = at_place(between, place - at_low.stop)
    start = at_low.stop + count_of(between < value)
    return OrderStatistic(value, start, [count_of(chunk.between == value) for chunk in counts])
