"""CPU tensors as NumPy arrays: NumPy counts, finds and sorts several times as fast as torch.

NumPy uses one core; ``on_all_cores`` runs it in threads. The functions below that one take what
``as_array`` returns.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


def as_array(tensor: Tensor) -> Any:
    """Return a CPU tensor as an array in the same memory, and any other as it is."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def library_of(array: Any) -> Any:
    """Return the library of an array: numpy or torch, which give many functions the same names."""
    return np if isinstance(array, np.ndarray) else torch


def on_all_cores(
    function: Callable[[Item], object], items: Sequence[Item], device: torch.device
) -> None:
    """Call a function for each item, on a CPU in as many threads as torch may use."""
    left = iter(items)

    def work() -> None:
        try:
            for item in left:  # each thread takes the next one
                function(item)
        finally:
            for _ in left:  # after a failure, the others stop too
                pass

    others = min(torch.get_num_threads(), len(items)) - 1 if device.type == "cpu" else 0
    if others < 1:
        work()
        return
    with ThreadPoolExecutor(others) as pool:
        working = [pool.submit(work) for _ in range(others)]
        work()  # this thread is on a core already
        for each in working:
            each.result()


def places_of(flags: Any) -> Any:
    """Return the places at which one-dimensional flags are set."""
    return np.flatnonzero(flags) if isinstance(flags, np.ndarray) else flags.nonzero()[:, 0]


def count_of(flags: Any) -> int:
    """Return how many flags are set."""
    return int(library_of(flags).count_nonzero(flags))


def at_place(array: Any, place: int) -> float:
    """Return what would be at a place if the numbers were in rising order."""
    if isinstance(array, np.ndarray):
        return float(np.partition(array, place)[place])
    return float(array.sort().values[place])


def in_order(array: Any) -> Any:
    """Return the numbers of the last axis in rising order."""
    return np.sort(array) if isinstance(array, np.ndarray) else array.sort().values
