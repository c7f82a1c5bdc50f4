"""New memory in huge pages."""

import mmap

import torch
from torch import Tensor

# Bytes. Below, an allocator has memory that was used before, whose pages are made already.
_LEAST = 1 << 22


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new contiguous tensor with any content, as ``torch.empty_like`` does.

    A kernel makes and clears the pages of new memory one by one, when they are first written. With
    4 KB each, that takes several times as long as to write them. Linux gives pages of 2 MB where it
    is asked to.

    Args:
        tensor: whose shape and device the new tensor has.
        dtype: its dtype; without it, that of ``tensor``.
    """
    dtype = dtype or tensor.dtype
    if tensor.device.type == "cpu" and tensor.numel() * dtype.itemsize >= _LEAST:
        memory = _huge(tensor.numel() * dtype.itemsize)
        if memory is not None:
            return torch.frombuffer(memory, dtype=dtype).view(tensor.shape)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _huge(size: int) -> mmap.mmap | None:
    """Return new memory of this many bytes in huge pages, if the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them; or no memory, of which torch.empty has more to say
        return None
    return memory
