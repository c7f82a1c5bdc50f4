"""Where a sort would cut numbers in two, without sorting them.

torch sorts on the CPU with the C++ library's ``std::sort``. Where numbers are equal, it leaves them
in an order that follows from its steps alone, and bfloat16 task vectors have thousands of equal
magnitudes. To cut these as ``torch.argsort`` does, this module takes the same steps, but only in
the ranges that hold a cut, and moves only the numbers that a later step looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

Pairs = NDArray[np.int64]
Indices = NDArray[np.int64]
_Range = tuple[int, int]

# libstdc++ leaves ranges of up to 16 numbers to one insertion sort, which is stable.
_SHORT = 16
# A block of 2^15 pairs stays in a core's own cache.
_BLOCK = 1 << 15
_INDEX = (1 << 32) - 1
# A cut's value is guessed from a random sample; its rank there is off by six standard deviations at
# most.
_SAMPLE = 1 << 14
_MARGIN = 6 * 64
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Cut:
    """Where a sort cuts numbers in two.

    Attributes:
        magnitude: larger ones are on one side, smaller ones on the other.
        before: the indices, rising, of the magnitudes that equal it and are before the cut.
        behind: those of the magnitudes that equal it and are behind the cut.
    """

    magnitude: float
    before: Indices
    behind: Indices


def fill_pairs(pairs: Pairs, magnitudes: NDArray[np.float32], start: int, descending: bool) -> None:
    """Write a number's rank in the upper half of each pair, and its index in the lower half.

    The bit pattern of a float32 that is not negative grows with the number.

    Args:
        pairs: int64, as many as the magnitudes.
        magnitudes: contiguous float32 numbers of at least 0, without NaN and -0.0.
        start: the index of the first number, below 2^32 like all others.
        descending: whether the largest number comes first.
    """
    pairs[:] = magnitudes.view(np.int32)
    np.left_shift(pairs, 32, out=pairs)
    combine = np.subtract if descending else np.add
    combine(np.arange(start, start + len(pairs)), pairs, out=pairs)


def cuts(pairs: Pairs, places: Sequence[int]) -> list[Cut] | None:
    """Return how ``torch.argsort`` cuts numbers at some places of the sorted order.

    Args:
        pairs: those of :func:`fill_pairs`, all of a tensor; they are overwritten.
        places: how many numbers are before each cut: at least one, and not all.

    Returns:
        A cut for each place; None if ``std::sort`` would go on with a heap sort, as it does for
        some regular orders, such as two rising halves, or if the sample misled.
    """
    guesses = _guesses(pairs, places)
    found: dict[int, tuple[int, _Range]] = {}
    size = len(pairs)
    # Each range has the depth that is left, the places of the cuts in it, and the range around it
    # that holds all numbers that may equal the value at such a cut.
    ranges = [((0, size), 2 * (size.bit_length() - 1), list(places), (0, size))]
    while ranges:
        (first, last), depth, inside, around = ranges.pop()
        if last - first <= _SHORT:
            short = pairs[first:last]
            short[:] = short[np.argsort(short >> 32, kind="stable")]
            found |= {place: (int(pairs[place]) >> 32, around) for place in inside}
            continue
        if depth == 0:
            return None
        pivot = _move_pivot(pairs, first, last)
        guessed = [guesses[place] for place in inside]
        # Where the value at a cut may be the pivot's, numbers on both sides may equal it.
        unsure = around != (first, last) or any(low <= pivot <= high for low, high in guessed)
        lower = unsure or any(pivot > high for _, high in guessed)
        upper = unsure or any(pivot < low for low, _ in guessed)
        middle = _partition(pairs, first + 1, last, pivot, lower, upper)
        found |= {place: (pivot, around) for place in inside if place == middle}
        for part, wanted in (((first, middle), lower), ((middle, last), upper)):
            if some := [place for place in inside if part[0] < place < part[1]]:
                if not wanted:
                    return None
                ranges.append((part, depth - 1, some, around if unsure else part))
    for place, (low, high) in guesses.items():
        if not low <= found[place][0] <= high:
            return None
    return [_cut(pairs, place, *found[place]) for place in places]


@cache
def follows_torch() -> bool:
    """Return whether this torch cuts equal numbers as this module does."""
    numbers = torch.arange(3000).mul_(7919).remainder_(61).float()
    places = [500, 1500]
    for descending in (False, True):
        pairs = np.empty(len(numbers), np.int64)
        fill_pairs(pairs, numbers.numpy(), 0, descending)
        order = torch.argsort(numbers, descending=descending)
        for place, cut in zip(places, cuts(pairs, places) or [], strict=True):
            before = order[:place][numbers[order[:place]] == cut.magnitude]
            if not np.array_equal(cut.before, before.sort().values.numpy()):
                return False
    return True


def _guesses(pairs: Pairs, places: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return, for each place, a least and a largest key, between which its number should be."""
    if len(pairs) <= _SAMPLE:
        return dict.fromkeys(places, (-_INDEX, _INDEX))
    chosen = np.random.default_rng(0).integers(len(pairs), size=_SAMPLE)
    keys = [-_INDEX, *np.sort(pairs[chosen] >> 32).tolist(), _INDEX]
    ranks = {place: place * _SAMPLE // len(pairs) for place in places}
    return {
        place: (keys[max(0, rank - _MARGIN)], keys[min(rank + _MARGIN, len(keys) - 1)])
        for place, rank in ranks.items()
    }


def _cut(pairs: Pairs, place: int, key: int, around: _Range) -> Cut:
    """Return a cut, given the key there, and a range with all pairs that have it."""
    first, last = around
    magnitude = float(np.int32(abs(key)).view(np.float32))
    if magnitude == 0:  # zeros are the same whether they are kept or not
        return Cut(magnitude, _NONE, _NONE)
    blocks = [
        (start, pairs[start : min(start + _BLOCK, last)]) for start in range(first, last, _BLOCK)
    ]
    equal = np.concatenate([start + np.flatnonzero(block >> 32 == key) for start, block in blocks])
    before = int(np.searchsorted(equal, place))
    indices = pairs[equal] & _INDEX
    return Cut(magnitude, np.sort(indices[:before]), np.sort(indices[before:]))


def _median(places: Sequence[int], keys: Sequence[int]) -> int:
    x, y, z = places
    a, b, c = keys
    if a < b:
        return y if b < c else z if a < c else x
    return x if a < c else z if b < c else y


def _move_pivot(pairs: Pairs, first: int, last: int) -> int:
    """Put the median of three first, as ``std::__move_median_to_first`` does; return its key."""
    candidates = [first + 1, first + (last - first) // 2, last - 1]
    median = _median(candidates, [int(pairs[place]) >> 32 for place in candidates])
    pairs[[first, median]] = pairs[[median, first]]
    return int(pairs[first]) >> 32


def _partition(pairs: Pairs, first: int, last: int, pivot: int, lower: bool, upper: bool) -> int:
    """Split a range at a key as ``std::__unguarded_partition`` does; return where it is split.

    That function swaps the first number from the left that is not below the pivot with the first
    from the right that is not above it, then the next two, until they meet. Here those of a block
    from each side are swapped at a time.

    Args:
        pairs: the pairs of all ranges.
        first: the start of the range.
        last: the end of the range.
        pivot: the key.
        lower: whether the numbers on the left are wanted.
        upper: whether those on the right are.
    """
    least, most = pivot << 32, pivot << 32 | _INDEX
    left = right = pairs[:0]
    lefts = rights = _NONE
    while last - first > 2 * _BLOCK:
        if not len(lefts):
            left = pairs[first : first + _BLOCK]
            lefts = np.flatnonzero(left >= least)
            first += _BLOCK
        if not len(rights):
            last -= _BLOCK
            right = pairs[last : last + _BLOCK]
            rights = np.flatnonzero(right <= most)[::-1]
        count = min(len(lefts), len(rights))
        _swap(left, lefts[:count], right, rights[:count], lower, upper)
        lefts, rights = lefts[count:], rights[count:]
    # What is left of the last two blocks is looked at again.
    first -= _BLOCK - int(lefts[0]) if len(lefts) else 0
    last += int(rights[0]) + 1 if len(rights) else 0
    rest = pairs[first:last]
    lefts = np.flatnonzero(rest >= least)
    rights = np.flatnonzero(rest <= most)[::-1]
    common = min(len(lefts), len(rights))
    count = int(np.count_nonzero(lefts[:common] < rights[:common]))
    _swap(rest, lefts[:count], rest, rights[:count], lower, upper)
    # The next number from the left that is not below the pivot; the last one swapped is one, too.
    return first + int(min([*lefts[count : count + 1], *rights[:count][-1:], len(rest)]))


def _swap(
    left: Pairs, lefts: Indices, right: Pairs, rights: Indices, lower: bool, upper: bool
) -> None:
    """Swap numbers, or move those of one side to the other if only that one is wanted."""
    kept = left[lefts] if upper else left[:0]
    if lower:
        left[lefts] = right[rights]
    if upper:
        right[rights] = kept
