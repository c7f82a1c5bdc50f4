"""The numbers that a sort would put at given places, without sorting the others.

torch sorts on the CPU with the C++ library's ``std::sort``. Where numbers are equal, it leaves them
in an order that follows from its steps alone, and bfloat16 task vectors have thousands of equal
magnitudes. To keep the same ones as ``torch.argsort``, this module takes the same steps, but only
in the ranges that hold an end of what is kept.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

Pairs = NDArray[np.int64]

# libstdc++ leaves ranges of up to 16 numbers to one insertion sort, which is stable.
_SHORT = 16
# A block of 2^15 pairs stays in a core's own cache.
_BLOCK = 1 << 15
_INDEX = (1 << 32) - 1


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


def indices_between(pairs: Pairs, start: int, stop: int) -> Pairs | None:
    """Return the indices that ``torch.argsort`` puts at ``[start:stop]``, in no order.

    Args:
        pairs: those of :func:`fill_pairs`, all of a tensor; they are rearranged.
        start: the first place.
        stop: the place after the last one.

    Returns:
        A view of the pairs, which now holds indices; None if ``std::sort`` would go on with a
        heap sort, as it does for some regular orders, such as two rising halves.
    """
    if not _sort_around(pairs, [start, stop]):
        return None
    chosen = pairs[start:stop]
    chosen &= _INDEX
    return chosen


@cache
def follows_torch() -> bool:
    """Return whether this torch keeps the same of several equal numbers as this module."""
    numbers = torch.arange(3000).mul_(7919).remainder_(61).float()
    for descending in (False, True):
        pairs = np.empty(len(numbers), np.int64)
        fill_pairs(pairs, numbers.numpy(), 0, descending)
        kept = indices_between(pairs, 500, 1500)
        expected = torch.argsort(numbers, descending=descending)[500:1500]
        if kept is None or not np.array_equal(np.sort(kept), np.sort(expected.numpy())):
            return False
    return True


def _sort_around(pairs: Pairs, ends: Sequence[int]) -> bool:
    """Do what ``std::sort`` does to the ranges that hold an end; return False if it gives up."""
    ranges = [(0, len(pairs), 2 * (len(pairs).bit_length() - 1))]
    while ranges:
        first, last, depth = ranges.pop()
        if not any(first < end < last for end in ends):
            continue
        if last - first <= _SHORT:
            short = pairs[first:last]
            short[:] = short[np.argsort(short >> 32, kind="stable")]
        elif depth == 0:
            return False
        else:
            cut = _partition_around_median(pairs, first, last)
            ranges += [(first, cut, depth - 1), (cut, last, depth - 1)]
    return True


def _partition_around_median(pairs: Pairs, first: int, last: int) -> int:
    """Split a range by the median of three as ``std::__unguarded_partition_pivot`` does."""
    candidates = [first + 1, first + (last - first) // 2, last - 1]
    median = _median(candidates, [int(pairs[c]) >> 32 for c in candidates])
    pairs[[first, median]] = pairs[[median, first]]
    pivot = int(pairs[first]) >> 32
    return _partition(pairs, first + 1, last, pivot << 32, pivot << 32 | _INDEX)


def _median(places: Sequence[int], keys: Sequence[int]) -> int:
    """Return the place that ``std::__move_median_to_first`` chooses of three."""
    x, y, z = places
    a, b, c = keys
    if a < b:
        return y if b < c else z if a < c else x
    return x if a < c else z if b < c else y


def _partition(pairs: Pairs, first: int, last: int, least: int, most: int) -> int:
    """Split a range at a pivot as ``std::__unguarded_partition`` does; return where it is split.

    That function swaps the first number from the left that is not below the pivot with the first
    from the right that is not above it, then the next two, until they meet. Here a block from
    each side is swapped at a time.

    Args:
        pairs: the pairs of all ranges.
        first: the start of the range.
        last: the end of the range.
        least: the least pair with the pivot's key.
        most: the largest pair with the pivot's key.
    """
    while last - first > 2 * _BLOCK:
        left, right = pairs[first : first + _BLOCK], pairs[last - _BLOCK : last]
        lefts = np.flatnonzero(left >= least)
        rights = np.flatnonzero(right <= most)[::-1]
        count = min(len(lefts), len(rights))
        _swap(left, lefts[:count], right, rights[:count])
        first += int(lefts[count]) if count < len(lefts) else _BLOCK
        last -= _BLOCK - 1 - int(rights[count]) if count < len(rights) else _BLOCK
    rest = pairs[first:last]
    lefts = np.flatnonzero(rest >= least)
    rights = np.flatnonzero(rest <= most)[::-1]
    common = min(len(lefts), len(rights))
    count = int(np.count_nonzero(lefts[:common] < rights[:common]))
    _swap(rest, lefts[:count], rest, rights[:count])
    # The next number from the left that is not below the pivot; the last one swapped is one, too.
    return first + int(min([*lefts[count : count + 1], *rights[:count][-1:], len(rest)]))


def _swap(left: Pairs, lefts: Pairs, right: Pairs, rights: Pairs) -> None:
    kept = left[lefts]
    left[lefts] = right[rights]
    right[rights] = kept
