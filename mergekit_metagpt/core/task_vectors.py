"""Tensor kernels: task vectors, their squared norms, and the base plus their weighted sum.

They process the tensors in chunks, in buffers that are reused from call to call. All arithmetic is
float32 (float64 for float64 inputs), sums across rows are float64, and a result is rounded to its
dtype once.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from mergekit_metagpt.core.buffers import (
    buffers_like,
    chunks_of,
    converted,
    room_for,
    where_possible,
)
from mergekit_metagpt.mergekit_private import squared_difference

# torch.sum adds float32 pairwise. Over rows of 4096 its error is at most 2e-7, even if all
# elements are equal and round the same way. A vector_norm of a row is off by 6e-6, a dot by 1e-4.
_ROW = 1 << 12
# Below this mean square, float32 squares start to underflow (the least normal one is 1e-38).
_LEAST_MEAN_SQUARE = 1e-30


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that inputs of ``dtype`` are subtracted and scaled in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds the values of all tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def squared_norms(base: Tensor, experts: Sequence[Tensor]) -> list[float]:
    """Return ‖θ_t − θ_0‖², the squared Frobenius norm, for every expert.

    They are within 1e-6 relative of a float64 computation. A norm is not finite only if the base
    or that expert contains NaN or Inf, or if the square exceeds even float64's range.
    """
    dtype = promoted_dtype([base, *experts])
    sums = _sums_of_squares(base, experts, working_dtype(dtype))
    if dtype != torch.float64:
        for t, expert in enumerate(experts):
            # Zero most likely means an unchanged tensor, which needs no second computation.
            if not in_float32_range(sums[t], base.numel()) and not torch.equal(base, expert):
                [sums[t]] = _sums_of_squares(base, [expert], torch.float64)
    return sums


def squared_norm(tensor: Tensor) -> float:
    """Return ‖θ‖² of a tensor of any shape and floating-point dtype, summed as above."""
    zeros = tensor.new_zeros((), dtype=working_dtype(tensor.dtype)).expand_as(tensor)
    return squared_norms(zeros, [tensor])[0]


def inner_products(base: Tensor, experts: Sequence[Tensor]) -> list[list[float]]:
    """Return ⟨θ_i − θ_0, θ_j − θ_0⟩, the T x T Gram matrix of the task vectors.

    Its diagonal is the result of :func:`squared_norms`.
    """
    norms = squared_norms(base, experts)
    # No product and no partial sum of products is larger than the largest square.
    in_range = all(norm == 0 or in_float32_range(norm, base.numel()) for norm in norms)
    dtype = working_dtype(promoted_dtype([base, *experts])) if in_range else torch.float64
    base, *experts = where_possible(dtype, base, *experts)
    sums: dict[tuple[int, int], Sum] = {
        (i, j): Sum() for i in range(len(experts)) for j in range(i)
    }
    origin, product, *differences = buffers_like(base, dtype, 2 + len(experts))
    for base_chunk, *chunks in chunks_of(base, *experts):
        n = len(base_chunk)
        start = converted(base_chunk, origin)
        for difference, chunk in zip(differences, chunks, strict=True):
            torch.sub(converted(chunk, difference), start, out=difference[:n])
        for (i, j), total in sums.items():
            total.add(torch.mul(differences[i][:n], differences[j][:n], out=product[:n]))
    products = [[0.0] * len(experts) for _ in experts]
    for (i, j), total in sums.items():
        products[i][j] = products[j][i] = total.value
    for t, norm in enumerate(norms):
        products[t][t] = norm
    return products


def add_task_vectors(
    base: Tensor,
    experts: Sequence[Tensor],
    coefficients: Sequence[float],
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return θ_0 + s Σ_t λ_t (θ_t − θ_0), equation 2 of the paper.

    It is computed as the weighted mean of the experts, then as a point on the line from the
    base to that mean. This takes one interpolation per expert, not three passes for
    differences, products and sums. Where the base and all experts have the same value, the
    result has it too, bit for bit.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype.
        experts: θ_t, T tensors of the base's shape and device.
        coefficients: λ_t ≥ 0, T finite floats; they are constants for autograd.
        scale: s, MergeKit's ``lambda``.
        out: a contiguous tensor to write the result to; not used with autograd.

    Returns:
        ``out``, or a new tensor of the base's shape, dtype and device.
    """
    # The largest first: each later expert then has a share of at most 1/2. With a share close to
    # 1, float32 would keep only the last digits of 1 - share, the weight of an earlier expert.
    chosen = [(e, c) for e, c in zip(experts, coefficients, strict=True) if c]
    chosen.sort(key=lambda pair: -pair[1])
    if not chosen:
        return base.clone() if out is None else out.copy_(base)
    dtype = working_dtype(promoted_dtype([base, *experts]))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (base, *experts)):
        origin = base.to(dtype)
        return (origin + scale * sum((e - origin) * c for e, c in chosen)).to(base.dtype)

    totals = list(accumulate(c for _, c in chosen))
    # The share of each later expert in the mean of all experts up to it. `distance` says how far
    # along the line from the base to the final mean the result is.
    shares = [c / total for (_, c), total in zip(chosen, totals, strict=True)][1:]
    distance = scale * totals[-1]
    if out is None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    buffers = buffers_like(base, dtype, 2)
    for merged, origin, first, *others in chunks_of(out, base, *(e for e, _ in chosen)):
        target = merged if merged.dtype == dtype else buffers[0][: len(merged)]
        mean = converted(first, buffers[0])
        for chunk, share in zip(others, shares, strict=True):
            mean = torch.lerp(mean, converted(chunk, buffers[1]), share, out=target)
        if not math.isclose(distance, 1, rel_tol=1e-14):
            mean = torch.lerp(converted(origin, buffers[1]), mean, distance, out=target)
        if mean is not merged:
            merged.copy_(mean)
    return out


def deltas_of(
    base: Tensor, experts: Sequence[Tensor], chunks: Sequence[slice]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of flat task vectors side by side, in float32.

    Yields:
        The base there (n), and the task vectors there (T, n). The tensors may be overwritten; the
        next chunk does so, too.
    """
    flat = [base, *experts]
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    room = room_for(base, torch.float32, len(flat) * max(lengths))
    for chunk, length in zip(chunks, lengths, strict=True):
        rows = room[: len(flat) * length].view(len(flat), length)
        for row, tensor in zip(rows, flat, strict=True):
            row.copy_(tensor[chunk])
        for row in rows[1:]:  # at once, torch would give each core other columns than before
            row.sub_(rows[0])
        yield rows[0], rows[1:]


def in_float32_range(squared_norm: float, size: int) -> bool:
    """Return whether float32 holds the squares of so many numbers without loss."""
    return _LEAST_MEAN_SQUARE * size <= squared_norm < torch.finfo(torch.float32).max


class Sum:
    """A float64 sum of float32 or float64 values; only reading it waits for the device."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Add up a flat tensor, which may be overwritten afterwards."""
        whole = len(values) - len(values) % _ROW
        self._rows.append(values[:whole].view(-1, _ROW).sum(dim=1))
        if whole < len(values):
            self._rows.append(values[whole:].sum().view(1))

    @property
    def value(self) -> float:
        """The sum so far; added up on the host, since not every device has float64."""
        return float(torch.cat(self._rows).cpu().double().sum()) if self._rows else 0.0


def _sums_of_squares(base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """Return ‖θ_t − θ_0‖² for every expert, differences and squares in ``dtype``."""
    base, *experts = where_possible(dtype, base, *experts)
    sums = [Sum() for _ in experts]
    origin, squares = buffers_like(base, dtype, 2)
    for base_chunk, *chunks in chunks_of(base, *experts):
        start, out = converted(base_chunk, origin), squares[: len(base_chunk)]
        for total, chunk in zip(sums, chunks, strict=True):
            total.add(squared_difference(converted(chunk, squares), start, out))
    return [total.value for total in sums]
