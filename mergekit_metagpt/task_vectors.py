"""Tensor kernels: squared norms of task vectors, and the base plus their weighted sum.

Both stream over the tensors in chunks through buffers that are allocated once, since
fresh large temporaries cost page faults, which took half of the time of the obvious
formulas. Differences and products are float32 (float64 for float64 inputs), sums
across rows are float64, and a result is rounded to its dtype once.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

# A chunk of 2^19 elements stays in cache; much smaller ones pay for waking the thread
# pool, and an accelerator wants few large kernels.
_CHUNK = 1 << 19
_ACCELERATOR_CHUNK = 1 << 25
# torch.sum adds float32 pairwise: over rows of 4096 it is right to 2e-7 even where all
# elements are equal and round alike. A vector_norm of a row misses by 6e-6, a dot by 1e-4.
_ROW = 1 << 12
# Below this mean square, float32 squares start to vanish (its least normal number is 1e-38).
_LEAST_MEAN_SQUARE = 1e-30


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that inputs of ``dtype`` are subtracted and scaled in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds the values of all tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def squared_norms(base: Tensor, experts: Sequence[Tensor]) -> list[float]:
    """Return ‖θ_t − θ_0‖², the squared Frobenius norm, for every expert.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype.
        experts: θ_t, T tensors of the base's shape and device.

    Returns:
        T floats, within 1e-6 relative of a float64 computation. They are not finite
        exactly where the base or that expert holds NaN or Inf, or where the square
        leaves even float64's range.
    """
    dtype = promoted_dtype([base, *experts])
    sums = _sums_of_squares(base, experts, working_dtype(dtype)).tolist()
    if dtype != torch.float64:
        least = _LEAST_MEAN_SQUARE * base.numel()
        for t, expert in enumerate(experts):
            # Out of float32's range, or exactly zero and then most likely unchanged.
            if not least <= sums[t] < float("inf") and not torch.equal(base, expert):
                sums[t] = _sums_of_squares(base, [expert], torch.float64).item()
    return [float(value) for value in sums]


def inner_products(base: Tensor, experts: Sequence[Tensor]) -> list[list[float]]:
    """Return ⟨θ_i − θ_0, θ_j − θ_0⟩, the Gram matrix of the task vectors.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype.
        experts: θ_t, T tensors of the base's shape and device.

    Returns:
        A symmetric T x T matrix; its diagonal is that of :func:`squared_norms`.
    """
    norms = squared_norms(base, experts)
    in_range = all(n == 0 or n >= _LEAST_MEAN_SQUARE * base.numel() for n in norms)
    dtype = working_dtype(promoted_dtype([base, *experts])) if in_range else torch.float64
    count = len(experts)
    sums = torch.zeros(count, count, dtype=torch.float64, device=base.device)
    origin, product, *differences = _buffers(base, dtype, 2 + count)
    for base_chunk, *chunks in _chunks(base, *experts):
        n = len(base_chunk)
        origin[:n].copy_(base_chunk)
        for i, chunk in enumerate(chunks):
            torch.sub(chunk, origin[:n], out=differences[i][:n])
            for j in range(i):
                sums[i, j] += _sum(
                    torch.mul(differences[i][:n], differences[j][:n], out=product[:n])
                )
    products: list[list[float]] = (sums + sums.T).tolist()
    for t, norm in enumerate(norms):
        products[t][t] = norm
    return products


def add_task_vectors(
    base: Tensor, experts: Sequence[Tensor], coefficients: Sequence[float], scale: float = 1.0
) -> Tensor:
    """Return θ_0 + s Σ_t λ_t (θ_t − θ_0), equation 2 of the paper.

    In float32 these are the operations of MergeKit's ``task_arithmetic`` in their order, so
    that equal weights give equal bytes.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype.
        experts: θ_t, T tensors of the base's shape and device.
        coefficients: λ_t, T finite floats; they are constants for autograd.
        scale: s, MergeKit's ``lambda``.

    Returns:
        A new tensor of the base's shape, dtype and device.
    """
    dtype = working_dtype(promoted_dtype([base, *experts]))
    chosen = [(e, c) for e, c in zip(experts, coefficients, strict=True) if c]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (base, *experts)):
        origin = base.to(dtype)
        return (origin + scale * sum((e - origin) * c for e, c in chosen)).to(base.dtype)

    merged = torch.empty_like(base, memory_format=torch.contiguous_format, requires_grad=False)
    origin, weighted, total = _buffers(base, dtype, 3)
    for base_chunk, out, *chunks in _chunks(base, merged, *(e for e, _ in chosen)):
        n = len(base_chunk)
        origin[:n].copy_(base_chunk)
        total[:n].zero_()
        for chunk, (_, coefficient) in zip(chunks, chosen, strict=True):
            total[:n] += torch.sub(chunk, origin[:n], out=weighted[:n]).mul_(coefficient)
        if scale != 1:
            total[:n] *= scale
        out.copy_(total[:n].add_(origin[:n]))
    return merged


def _sums_of_squares(base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return ‖θ_t − θ_0‖² as a float64 tensor of shape [T], differences in ``dtype``."""
    sums = torch.zeros(len(experts), dtype=torch.float64, device=base.device)
    origin, difference = _buffers(base, dtype, 2)
    for base_chunk, *chunks in _chunks(base, *experts):
        n = len(base_chunk)
        origin[:n].copy_(base_chunk)
        for t, chunk in enumerate(chunks):
            sums[t] += _sum(torch.sub(chunk, origin[:n], out=difference[:n]).square_())
    return sums


def _sum(values: Tensor) -> Tensor:
    """Return the sum of a flat tensor as a float64 scalar."""
    rows = len(values) - len(values) % _ROW
    whole = values[:rows].view(-1, _ROW).sum(dim=1).double().sum()
    return whole + values[rows:].sum().double()


def _chunk_size(tensor: Tensor) -> int:
    limit = _CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK
    return max(1, min(limit, tensor.numel()))


def _buffers(like: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    size = _chunk_size(like)
    return [torch.empty(size, dtype=dtype, device=like.device) for _ in range(count)]


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield the tensors' flat chunks side by side, detached from autograd."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    size = _chunk_size(tensors[0])
    for start in range(0, tensors[0].numel(), size):
        yield [tensor[start : start + size] for tensor in flat]
