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


def as_float32(tensor: Tensor) -> Any:
    """Return what ``as_array`` does, in float32; NumPy has no bfloat16, the upper half of one."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16:
        return as_array(tensor.float())
    bits = tensor.view(torch.int16).numpy().astype(np.int32)
    bits <<= 16
    return bits.view(np.float32)


def places_of(flags: Any) -> Any:
    """Return the places at which one-dimensional flags are set."""
    return np.flatnonzero(flags) if isinstance(flags, np.ndarray) else flags.nonzero()[:, 0]


def count_of(flags: Any) -> int:
    """Return how many flags are set."""
    return int(np.count_nonzero(flags) if isinstance(flags, np.ndarray) else flags.sum())


def at_place(array: Any, place: int) -> float:
    """Return what would be at a place if the numbers were in rising order."""
    if isinstance(array, np.ndarray):
        return float(np.partition(array, place)[place])
    return float(array.sort().values[place])


def in_order(array: Any) -> Any:
    """Return the numbers in rising order."""
    return np.sort(array) if isinstance(array, np.ndarray) else array.sort().values


def places_in_order(rows: Any) -> Any:
    """Return the places of each row's float32 numbers ≥ 0 in rising order, equal ones as they are.

    NumPy sorts 16 bits by radix. Twice that takes half as long as one sort of 32 bits.
    """
    if not isinstance(rows, np.ndarray):
        return rows.sort(dim=1, stable=True).indices
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = np.array_split(rows, torch.get_num_threads())
        return np.concatenate(list(pool.map(_by_radix, parts)))


def _by_radix(rows: Any) -> Any:
    bits = rows.view(np.uint32)  # they grow with a number ≥ 0
    by_low = np.argsort(bits.astype(np.uint16), kind="stable")
    high = np.take_along_axis((bits >> 16).astype(np.uint16), by_low, axis=1)
    return np.take_along_axis(by_low, np.argsort(high, kind="stable"), axis=1)
