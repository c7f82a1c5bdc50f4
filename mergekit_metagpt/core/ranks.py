"""Random choices by rank: a number with a larger magnitude is more likely to be kept."""

from typing import Any

import numpy as np
import torch

from mergekit_metagpt.core.arrays import in_order, places_of

_LEAST_SPREAD = 1e-30  # so that equal probabilities do not divide by 0


def kept_by_rank(rows: Any, uniform: Any, by_rank: Any) -> Any:
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
