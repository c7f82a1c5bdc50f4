"""Chunks of tensors, and the buffers that calculations on them reuse.

The obvious formulas spend half of their time on page faults of new temporaries.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

# A chunk of 2^20 elements stays in the last-level cache. Smaller chunks spend more time on
# waking the thread pool. An accelerator needs few large kernels.
_CHUNK = 1 << 20
ACCELERATOR_CHUNK = 1 << 25
# A block of rows of the base and of all task vectors has so many numbers.
BLOCK = 1 << 22
# torch.sum over five or more rows adds them in another order beyond the last block of up to 128
# columns. So parts of several rows hold a multiple of that, and the last one is not smaller.
_COLUMNS = 128


class _Scratch(threading.local):
    """The buffers that each thread keeps for its next call."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, list[Tensor]] = {}
        self.rooms: dict[torch.dtype, Tensor] = {}


_SCRATCH = _Scratch()


def buffers_like(like: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Return room for ``count`` chunks, which the next call in this thread overwrites."""
    if like.device.type != "cpu":  # an accelerator's allocator reuses memory itself
        return [like.new_empty(_chunk_size(like), dtype=dtype) for _ in range(count)]
    buffers = _SCRATCH.buffers.setdefault(dtype, [])
    # Later callers reuse them, so they must not depend on this caller's inference mode or
    # default device.
    with torch.inference_mode(False):
        for _ in range(count - len(buffers)):
            buffers.append(torch.empty(_CHUNK, dtype=dtype, device="cpu"))
    return buffers[:count]


def room_for(like: Tensor, dtype: torch.dtype, numbers: int) -> Tensor:
    """Return room for so many numbers, which the next call in this thread overwrites."""
    if like.device.type != "cpu" or numbers > BLOCK:  # what is larger is not kept
        return like.new_empty(numbers, dtype=dtype)
    room = _SCRATCH.rooms.get(dtype)
    if room is None or len(room) < numbers:
        with torch.inference_mode(False):  # as in buffers_like
            room = _SCRATCH.rooms[dtype] = torch.empty(numbers, dtype=dtype, device="cpu")
    return room[:numbers]


def chunks_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' flat chunks side by side, detached from autograd."""
    size = _chunk_size(tensors[0])
    return zip(*(torch.split(t.detach().reshape(-1), size) for t in tensors), strict=True)


def _chunk_size(tensor: Tensor) -> int:
    return max(1, min(chunk_size(tensor.device), tensor.numel()))


def parts_of(size: int, length: int, unit: int = _COLUMNS) -> list[slice]:
    """Return parts of about a length, of whole units, but the last one also has the rest."""
    step = max(1, length // unit) * unit
    starts = range(0, max(1, size - unit + 1), step)
    return [slice(*pair) for pair in zip(starts, [*starts[1:], size], strict=True)]


def chunk_size(device: torch.device) -> int:
    """Return how many numbers are worked on at a time."""
    return _CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def converted(chunk: Tensor, buffer: Tensor) -> Tensor:
    """Return the chunk in the buffer's dtype: itself, or a copy in the buffer's first rows."""
    return chunk if chunk.dtype == buffer.dtype else buffer[: len(chunk)].copy_(chunk)


def where_possible(dtype: torch.dtype, *tensors: Tensor) -> Sequence[Tensor]:
    """Return the tensors on a device that supports the dtype: their own, or else the CPU."""
    if dtype != torch.float64 or _has_float64(tensors[0].device):
        return tensors
    return [tensor.cpu() for tensor in tensors]


@cache
def _has_float64(device: torch.device) -> bool:
    """Return whether a device calculates in float64; Apple's and some of Intel's do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).sum()
    except (RuntimeError, TypeError):
        return False
    return True
