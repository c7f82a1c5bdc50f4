"""Random choices of numbers, as MergeKit makes them, chunk by chunk.

DELLA keeps a number with a larger magnitude with a higher probability, which depends on its rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_metagpt.core.arrays import as_array, in_order, on_all_cores, places_of
from mergekit_metagpt.core.buffers import chunk_size, parts_of, room_for

_LEAST_SPREAD = 1e-30  # so that equal probabilities do not divide by 0
_SORTED_PARTS = 16  # of a chunk: a core sorts one, as int64 keys, and copies it


def drawn(density: float, like: Tensor, chunks: Sequence[slice]) -> Tensor:
    """Return marks (int8, 0 or 1) of numbers, each of which is drawn with a probability."""
    marks = torch.empty_like(like, dtype=torch.int8)
    for chunk in chunks:
        as_array(marks[chunk])[:] = as_array(_uniform(like[chunk])) < density
    return marks


def drawn_by_rank(
    base: Tensor, expert: Tensor, shape: Sequence[int], density: float, epsilon: float
) -> Tensor:
    """Return marks (int8, 0 or 1) of the numbers of θ_t − θ_0 that are drawn by rank.

    Args:
        base: θ_0, flat.
        expert: θ_t, flat.
        shape: that they had. The numbers along its second axis are ranked, or all of a vector.
        density: the mean of the probabilities.
        epsilon: how far the smallest and the largest number's are from it.
    """
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError("Epsilon must be chosen such that density +/- epsilon is in (0, 1)")
    length, *inner = shape[1:] if len(shape) > 1 else shape
    apart = math.prod(inner)
    ranks = torch.arange(length, dtype=torch.float32, device=base.device)
    by_rank = as_array(ranks.div_(length - 1).mul_(2 * epsilon).add_(density - epsilon))
    marks = torch.empty_like(base, dtype=torch.int8)
    for part in parts_of(len(base), chunk_size(base.device), length * apart):
        _draw_by_rank(marks[part], base[part], expert[part], apart, by_rank)
    return marks


def _draw_by_rank(marks: Tensor, base: Tensor, expert: Tensor, apart: int, by_rank: Any) -> None:
    """Mark what is drawn of a chunk, in which the numbers of a row are so far ``apart``."""
    uniform = _uniform(base)

    def rows_of(flat: Tensor) -> Any:
        return as_array(flat).reshape(-1, len(by_rank), apart).swapaxes(1, 2)

    def draw(part: slice) -> None:
        # Here, not by deltas_of before: torch's threads would keep a core busy beside these.
        magnitudes = rows_of(expert[part].float().sub(base[part]).abs_())
        rows_of(marks[part])[:] = _kept_by_rank(magnitudes, rows_of(uniform[part]), by_rank)

    parts = parts_of(len(base), chunk_size(base.device) // _SORTED_PARTS, len(by_rank) * apart)
    on_all_cores(draw, parts, base.device)


def _uniform(like: Tensor) -> Tensor:
    """Return numbers from 0 to 1 in float32, as ``torch.bernoulli`` draws them on the CPU.

    The next call in this thread overwrites them.
    """
    return room_for(like, torch.float32, len(like)).uniform_()


def _kept_by_rank(rows: Any, uniform: Any, by_rank: Any) -> Any:
    """Return which numbers are kept: those whose rank has a probability above what was drawn.

    Sorting keys, and looking up the least rank that each draw needs, takes less time than finding
    every rank.

    Args:
        rows: magnitudes in float32, of which those along the last axis are ranked; what
            ``as_array`` returns, as all others.
        uniform: what was drawn for each, from 0 to 1, in float32 and in the same shape.
        by_rank: the probability of each rank in a row, rising; of equal magnitudes the first has
            the highest rank.
    """
    length, shape = len(by_rank), rows.shape
    keys, uniform = _keys_of(rows.reshape(-1, length)), uniform.reshape(-1)
    ordered, keys = in_order(keys).reshape(-1), keys.reshape(-1)
    kept = uniform < by_rank[0]
    undecided = places_of((uniform >= by_rank[0]) & (uniform < by_rank[-1]))
    least = _counts_up_to(uniform[undecided], by_rank)  # the rank that is needed
    kept[undecided] = keys[undecided] >= ordered[undecided // length * length + least]
    return kept.reshape(shape)


def _keys_of(rows: Any) -> Any:
    """Return int64 keys in the order of each row's ranks; no two of a row are equal."""
    last = rows.shape[1] - 1
    keys: Any
    places: Any
    if isinstance(rows, np.ndarray):
        keys, places = rows.view(np.int32).astype(np.int64), np.arange(last, -1, -1)
    else:
        keys = rows.view(torch.int32).long()
        places = torch.arange(last, -1, -1, device=rows.device)
    keys <<= 32  # the bits grow with a number ≥ 0
    keys |= places
    return keys


def _counts_up_to(values: Any, rising: Any) -> Any:
    """Return how many of some rising numbers are not above each value.

    They are about evenly spaced, so a guess is nearly always right.
    """
    if not isinstance(values, np.ndarray):
        return torch.searchsorted(rising, values, right=True)
    per_step = (len(rising) - 1) / max(rising[-1] - rising[0], _LEAST_SPREAD)
    around = np.concatenate(([-np.inf], rising, [np.inf])).astype(rising.dtype)
    guesses = (values - rising[0]) * per_step + 1
    counts = np.minimum(guesses.astype(np.intp), len(rising))
    wrong = (around.take(counts) > values) | (around.take(counts + 1) <= values)
    counts[wrong] = np.searchsorted(rising, values[wrong], side="right")
    return counts
