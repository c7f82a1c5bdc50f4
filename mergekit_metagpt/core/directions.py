"""A coefficient for every direction: the paper's bound, minimized before its last step.

The paper bounds what a merge costs task t by ‖τ_t‖² ‖h_t‖², where h_t is the distance from the
merge to expert t. Cauchy and Schwarz lead there, and forget where h_t points. For a matrix,
tr(h_tᵀ τ_t τ_tᵀ h_t) is a bound that remembers. With S_t = τ_t τ_tᵀ, its sum over the experts is
least at::

    M = Σ_t Λ_t τ_t        Λ_t = (Σ_k S_k)⁻¹ S_t        Σ_t Λ_t = I

This is Theorem 10 with the squared norm replaced by the matrix whose trace it is. A part ρ of
each S_t is spread evenly over the m directions, so ρ = 1 is Theorem 10 itself::

    S_t = λ_t [(1 − ρ) u_t u_tᵀ + (ρ/m) I]        u_t = τ_t / ‖τ_t‖        tr S_t = λ_t

λ_t are the scaling coefficients of the matrix, by its norms, the priors and the exponent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_metagpt.core.coefficients import Norms, scaling_coefficients
from mergekit_metagpt.core.normal_equations import Equations, Solution
from mergekit_metagpt.core.task_vectors import where_possible, write_task_vector

SIDES = ("output", "input", "both")

# Without any isotropy, Σ S is singular if no expert moves in some direction.
_LEAST_ISOTROPY = 1e-8
# An expert with a smaller share changes nothing, and its square root could underflow.
_LEAST_TRACE = 1e-30
# A matrix with a coefficient per row is merged in blocks of about this many numbers.
_BLOCK = 1 << 20
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Rule:
    """How the coefficients follow from the task vectors of a tensor.

    Attributes:
        priors: w_t, T finite floats of at least 0.
        exponent: k ≥ 0 in λ_t ∝ w_t ‖τ_t‖^k.
        isotropy: ρ, from 0 to 1. 0 is the limit of a small ρ.
        side: one of :data:`SIDES`. ``output`` is S_t = τ_t τ_tᵀ, between the rows of a matrix;
            ``input`` is τ_tᵀ τ_t, between its columns; ``both`` minimizes the sum of their bounds.
    """

    priors: Sequence[float]
    exponent: float
    isotropy: float
    side: str

    def traces(self, squared_norms: Sequence[float]) -> list[float]:
        """Return λ_t = tr S_t, T floats; 0 for an expert that does not move."""
        priors = [w if q else 0.0 for w, q in zip(self.priors, squared_norms, strict=True)]
        return scaling_coefficients(squared_norms, priors, self.exponent)

    @property
    def regular_isotropy(self) -> float:
        """ρ, large enough that Σ S can be inverted."""
        return max(self.isotropy, _LEAST_ISOTROPY)


@dataclass(frozen=True)
class Directions:
    """A tensor that was merged by directions.

    Attributes:
        merged: θ_0 + s M, of the base's shape, dtype and device.
        means: tr Λ_t / m, T floats: each expert's coefficient, averaged over all directions.
            They sum to 1.
        kept: s ⟨M, τ_t⟩ / ‖τ_t‖², T floats: how much of each task vector is in the merge. With
            s = 1 they sum to T if the experts move in different directions.
        squared_norm: ‖s M‖². With s = 1 it is Σ_t ‖τ_t‖² if the experts move in different
            directions, and more if small differences between experts are amplified.
    """

    merged: Tensor
    means: Norms
    kept: Norms
    squared_norm: float


def merge_directions(
    base: Tensor,
    experts: Sequence[Tensor],
    rule: Rule,
    *,
    scale: float = 1.0,
    vocabulary_axis: int | None = None,
) -> Directions:
    """Return θ_0 + s M, where M = Σ_t Λ_t τ_t has a matrix Λ_t of coefficients for each expert.

    A vector has a coefficient per element, and a vocabulary matrix one per token: their S_t are
    diagonal. A tensor with more than two axes is a stack of matrices, its last two axes, and each
    is merged by itself. An expert that equals the base in a matrix takes no part there.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype, with an element.
        experts: θ_t, T tensors of the base's shape and device. All values are finite.
        rule: how Λ_t follows from τ_t.
        scale: s, MergeKit's ``lambda``.
        vocabulary_axis: the axis that has an entry for each token, if there is one.

    Raises:
        ValueError: if autograd would have to follow the result.
    """
    tensors = [base, *experts]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "Granularity direction computes no gradients; merge under torch.no_grad(), or set "
            "granularity: tensor."
        )
    tensors = [tensor.detach() for tensor in where_possible(torch.float64, *tensors)]
    stack: tuple[int, ...] = (-1, *base.shape[-2:])
    merge = _merge_matrix
    if base.dim() < 2 or vocabulary_axis is not None:
        tensors = [t.movedim(vocabulary_axis or 0, 0) if t.dim() else t.view(1) for t in tensors]
        stack = (1, len(tensors[0]), -1)
        merge = _merge_rows
    merged = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    matrices = zip(*(tensor.reshape(stack) for tensor in (merged, *tensors)), strict=True)
    buffers = _Buffers()
    parts = [
        merge(_TaskVectors(origin, others, buffers), rule, scale, out)
        for out, origin, *others in matrices
    ]
    if base.dim():
        merged = merged.movedim(0, vocabulary_axis or 0)
    return Directions(merged.reshape(base.shape).to(base.device), *_summarized(parts, scale))


class _Buffers:
    """Two buffers for task vectors, since the pages of new memory cost more than filling them."""

    def __init__(self) -> None:
        self._flat: dict[int, Tensor] = {}

    def like(self, tensor: Tensor, number: int) -> Tensor:
        """Return buffer ``number`` in a tensor's shape and in float64."""
        flat = self._flat.get(number)
        if flat is None or len(flat) < tensor.numel():
            flat = self._flat[number] = tensor.new_empty(tensor.numel(), dtype=torch.float64)
        return flat[: tensor.numel()].view(tensor.shape)


class _TaskVectors:
    """The task vectors of one matrix, computed whenever they are used, to save memory."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor], buffers: _Buffers) -> None:
        self._base, self._experts, self._buffers = base, experts, buffers
        self.shape = base.shape

    def __len__(self) -> int:
        return len(self._experts)

    def read(self, t: int, buffer: int = 0) -> Tensor:
        """Return τ_t, which the next call for this buffer overwrites."""
        tau = self._buffers.like(self._base, buffer)
        write_task_vector(self._base, self._experts[t], tau)
        return tau

    def blocks(self, rows: int) -> "list[_TaskVectors]":
        """Return the task vectors of every so many rows."""
        split = (torch.split(tensor, rows) for tensor in (self._base, *self._experts))
        return [
            _TaskVectors(base, experts, self._buffers)
            for base, *experts in zip(*split, strict=True)
        ]

    def squared_norms(self) -> list[float]:
        """Return ‖τ_t‖², T floats."""
        return [_dot(tau, tau) for tau in map(self.read, range(len(self)))]

    def products(self, merged: Tensor) -> list[float]:
        """Return ⟨M, τ_t⟩, T floats, of a contiguous M."""
        return [_dot(merged, self.read(t)) for t in range(len(self))]

    def write(self, merged: Tensor, scale: float, out: Tensor) -> None:
        """Write θ_0 + s M; this overwrites M."""
        merged = merged if scale == 1 else merged.mul_(scale)
        out.copy_(merged.add_(self._base))


@dataclass(frozen=True)
class _Part:
    """What is known of a merged matrix: tr Λ_t / m, ⟨M, τ_t⟩ and ‖τ_t‖², T floats each; ‖M‖²."""

    means: Sequence[float]
    products: Sequence[float]
    squared_norms: Sequence[float]
    squared_norm: float


def _summarized(parts: Sequence[_Part], scale: float) -> tuple[Norms, Norms, float]:
    """Return the figures of :class:`Directions` for a stack of matrices of the same shape."""
    means = (sum(column) / len(parts) for column in zip(*(p.means for p in parts), strict=True))
    products = map(sum, zip(*(part.products for part in parts), strict=True))
    norms = map(sum, zip(*(part.squared_norms for part in parts), strict=True))
    kept = (scale * p / n if n else 0.0 for p, n in zip(products, norms, strict=True))
    length = scale**2 * sum(part.squared_norm for part in parts)
    return tuple(means), tuple(kept), length


def _merge_rows(task_vectors: _TaskVectors, rule: Rule, scale: float, out: Tensor) -> _Part:
    """Merge with a coefficient per row, since every S_t is diagonal; in blocks of rows."""
    m, n = out.shape
    rows, experts = max(1, _BLOCK // n), range(len(task_vectors))
    blocks = task_vectors.blocks(rows)
    squares = torch.cat(
        [torch.stack([block.read(t).square_().sum(1) for t in experts]) for block in blocks], dim=1
    )
    norms = squares.sum(1)
    traces = norms.new_tensor(rule.traces(norms.tolist()))
    directed = squares.div_(norms.clamp_min(_TINY).unsqueeze(1))
    shares = directed.lerp_(torch.full_like(directed, 1 / m), rule.regular_isotropy)
    shares.mul_(traces.unsqueeze(1))
    shares.div_(shares.sum(0).clamp_min(_TINY))
    products, length = torch.zeros_like(norms), 0.0
    split = zip(blocks, torch.split(shares, rows, dim=1), torch.split(out, rows), strict=True)
    for block, part, target in split:
        merged = torch.zeros_like(target, dtype=torch.float64)
        for t in experts:
            merged.addcmul_(block.read(t), part[t].unsqueeze(1))
        products += products.new_tensor(block.products(merged))
        length += _dot(merged, merged)
        block.write(merged, scale, target)
    return _Part(shares.mean(1).tolist(), products.tolist(), norms.tolist(), length)


def _merge_matrix(task_vectors: _TaskVectors, rule: Rule, scale: float, out: Tensor) -> _Part:
    """Merge with a matrix of coefficients for each expert."""
    norms = task_vectors.squared_norms()
    traces = rule.traces(norms)
    movers = [t for t, trace in enumerate(traces) if trace > _LEAST_TRACE]
    directed = [0.0] * len(traces)
    if rule.isotropy == 1 or len(movers) < 2:
        merged = torch.zeros_like(out, dtype=torch.float64)
        for t in movers:
            merged.add_(task_vectors.read(t), alpha=traces[t])
    else:
        merged, found = _solve(task_vectors, movers, norms, traces, rule)
        for t, share in zip(movers, found, strict=True):
            directed[t] = share
    # Σ_t tr Λ_t / m = 1. What the directed parts leave of it is even, and shared by λ_t.
    even = 1 - sum(directed)
    means = [share + even * trace for share, trace in zip(directed, traces, strict=True)]
    part = _Part(means, task_vectors.products(merged), norms, _dot(merged, merged))
    task_vectors.write(merged, scale, out)
    return part


def _solve(
    task_vectors: _TaskVectors,
    movers: Sequence[int],
    norms: Sequence[float],
    traces: Sequence[float],
    rule: Rule,
) -> Solution:
    """Return M, contiguous, and the directed shares of the experts that move."""
    is_turned = rule.side == "input"

    def read(number: int, buffer: int) -> Tensor:
        tau = task_vectors.read(movers[number], buffer)
        return tau.T if is_turned else tau

    rows, columns = task_vectors.shape
    equations = Equations(
        read,
        (columns, rows) if is_turned else (rows, columns),
        [norms[t] for t in movers],
        [traces[t] for t in movers],
        rule.regular_isotropy,
    )
    merged, shares = equations.solve_both_sides() if rule.side == "both" else equations.solve()
    return (merged.T if is_turned else merged).contiguous(), shares


def _dot(first: Tensor, second: Tensor) -> float:
    """Return ⟨first, second⟩ of two contiguous matrices."""
    return float(torch.dot(first.view(-1), second.view(-1)))
