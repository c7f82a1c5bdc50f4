"""CPU tensors as NumPy arrays, which compare, find and sort several times as fast.

The other functions take what ``as_array`` returns.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(tensor: Tensor) -> Any:
    """Return a CPU tensor as an array in the same memory, and any other as it is."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def places_of(flags: Any) -> Any:
    """Return the places at which one-dimensional flags are set."""
    return np.flatnonzero(flags) if isinstance(flags, np.ndarray) else flags.nonzero()[:, 0]


def count_of(flags: Any) -> int:
    """Return how many flags are set."""
    return int(np.count_nonzero(flags) if isinstance(flags, np.ndarray) else flags.sum())


def at_places(array: Any, first: int, last: int) -> tuple[Any, Any]:
    """Return what would be at two places if the numbers were in rising order."""
    if isinstance(array, np.ndarray):
        ordered = np.partition(array, (first, last))
    else:
        ordered = array.sort().values
    return ordered[first], ordered[last]


def in_order(array: Any) -> Any:
    """Return the numbers in rising order, those of each row if there are rows."""
    if not isinstance(array, np.ndarray):
        return array.sort().values
    if array.ndim == 1:
        return np.sort(array)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = np.array_split(array, torch.get_num_threads())
        return np.concatenate(list(pool.map(np.sort, parts)))
