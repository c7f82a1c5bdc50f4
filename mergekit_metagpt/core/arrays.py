"""CPU tensors as NumPy arrays: NumPy compares, finds and sorts several times as fast as torch.

NumPy uses one core, so ``on_all_cores`` runs it in threads. The functions below that one take what
``as_array`` returns.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mergekit_metagpt.core.buffers import Room, own_room

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_array(tensor: Tensor) -> Any:
    """Return a CPU tensor as an array in the same memory, and any other as it is."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def library_of(array: Any) -> Any:
    """Return the library of an array: numpy or torch, which give many functions the same names."""
    return np if isinstance(array, np.ndarray) else torch


def as_bits(tensor: Tensor) -> Any:
    """Return what ``as_array`` does, but bfloat16 as its bits in int16: NumPy has no bfloat16."""
    is_narrow = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
    return as_array(tensor.view(torch.int16) if is_narrow else tensor)


def as_float32(numbers: Any, out: Any) -> Any:
    """Return what ``as_bits`` returned in float32: as it is, or converted into ``out``."""
    if numbers.dtype == np.float32:
        return numbers
    if numbers.dtype == np.int16:  # a bfloat16 is the upper half of a float32
        bits = out.view(np.int32)
        np.copyto(bits, numbers)
        bits <<= 16
    else:
        np.copyto(out, numbers)
    return out


def on_all_cores(
    function: Callable[[Item, Room], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """Apply a function to each item, on a CPU in as many threads as torch may use.

    The function gets room that only its own thread works in.
    """
    results, numbers = dict[int, Result](), iter(range(len(items)))

    def work() -> None:
        with own_room() as room:
            try:
                for number in numbers:  # each thread takes the next one
                    results[number] = function(items[number], room)
            finally:
                for _ in numbers:  # after a failure, the others stop too
                    pass

    others = min(torch.get_num_threads(), len(items)) - 1 if device.type == "cpu" else 0
    if others < 1:
        work()
    else:
        with ThreadPoolExecutor(others) as pool:
            working = [pool.submit(work) for _ in range(others)]
            work()  # this thread is on a core already
            for each in working:
                each.result()
    return [results[number] for number in range(len(items))]


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
