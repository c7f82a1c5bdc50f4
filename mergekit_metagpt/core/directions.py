"""A coefficient for every direction: decide where experts meet, add up where they do not.

What a merge costs task t is bounded by tr(h_t S_t h_tᵀ), where h_t is the distance from the merge
to expert t, and S_t = λ_t τ_tᵀ τ_t / ‖τ_t‖². The sum over the experts is least at Σ_t τ_t S_t C⁻¹
with C = Σ_t S_t: Theorem 10 with a matrix in place of each number. That inverse amplifies what the
experts do not determine. So it is used only in K leading eigenvectors of C, V; elsewhere the
experts hardly meet, and what they do is added up::

    M = Σ_t τ_t V (Vᵀ S_t V) (Vᵀ C V)⁻¹ Vᵀ + Σ_t c_t τ_t (I − V Vᵀ)

V lie within the span Q of the leading directions of every expert, which a randomized range finder
finds in a sample of the rows. K is the participation number of the eigenvalues. c_t is 1, but
experts that move alike share it. For the rows of a table that is only looked up, and the elements
of a vector, every S_t is diagonal, and M is their mean, weighted by S_t. The package's README says
where this comes from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.decision import Rule, solve
from mergekit_metagpt.core.matrices import MatrixInputs, matrices_of
from mergekit_metagpt.core.range_finder import basis_of, drawn_rows, longest_rows
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.core.task_vectors import (
    add_task_vectors,
    promoted_dtype,
    squared_norms,
    working_dtype,
)


@dataclass(frozen=True)
class Directions:
    """What a tensor comes to that is merged by directions.

    Attributes:
        squared_norms: ‖τ_t‖², T floats.
        kept: s ⟨M, τ_t⟩ / ‖τ_t‖², T floats: how much of each task vector is in the merge. With
            s = 1 they are 1 if the experts move in different directions.
        squared_norm: ‖s M‖². With s = 1 it is Σ_t ‖τ_t‖² if the experts move in different
            directions.
        scale: s.
        decided: K, in how many directions the coefficients decide; of a stack of matrices, their
            sum. None for a tensor that is no matrix.
        inputs: n, how many directions there are; of a stack, their sum.
    """

    squared_norms: Norms
    kept: Norms
    squared_norm: float
    scale: float
    decided: int | None
    inputs: int


def merge_directions(
    base: Tensor,
    experts: Sequence[Tensor],
    rule: Rule,
    *,
    role: Role = Role.LINEAR,
    name: str | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Directions:
    """Merge a tensor with a coefficient for every direction: θ_0 + s M.

    A tensor with more than two axes is a stack of matrices, its last two axes, and each is merged
    by itself. An expert that equals the base in a matrix takes no part there. A table has a
    coefficient for each row, and a tensor whose elements are used one by one, for each element.

    Args:
        base: θ_0, of any shape, strides, device and floating-point dtype, with an element.
        experts: θ_t, T tensors of the base's shape and device.
        rule: how the coefficients follow from τ_t.
        role: what the tensor does in its model; where it is a matrix, which axis its inputs have.
        name: the tensor's name; with its shape, it decides what the range finder draws.
        scale: s, MergeKit's ``lambda``.
        out: a contiguous tensor of the base's shape, device and dtype to write the merge to. None
            computes the figures only.

    Raises:
        ValueError: if autograd would have to follow the result, or ``out`` is not contiguous.
        FloatingPointError: if a number is NaN or Inf, or a square exceeds even float64's range.
    """
    tensors = [base, *experts]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "Granularity direction computes no gradients; merge under torch.no_grad(), or set "
            "granularity: tensor."
        )
    is_matrix = role in (Role.LINEAR, Role.TRANSPOSED)
    merge = _merge_matrix if is_matrix else _merge_rows
    most = max(rule.priors, default=0) or 1
    rule = replace(rule, priors=[prior / most for prior in rule.priors])  # the largest is 1
    matrices = [matrices_of(tensor.detach(), role) for tensor in tensors]
    if out is not None and not out.is_contiguous():
        raise ValueError("A merge by directions is written to a contiguous tensor.")
    targets = [None] * len(matrices[0]) if out is None else matrices_of(out, role)
    parts = []
    for number, (target, *views) in enumerate(zip(targets, *matrices, strict=True)):
        seed = crc32(f"{name}/{list(views[0].shape)}/{number}".encode())
        inputs = MatrixInputs(views[0], views[1:], working_dtype(promoted_dtype(views)), seed)
        parts.append(_merge_movers(merge, inputs, rule, scale, target))
    return _summarized(parts, scale, is_matrix)


def _merge_movers(
    merge: "_Merge", inputs: MatrixInputs, rule: Rule, scale: float, out: Tensor | None
) -> "_Part":
    """Merge the experts that differ from the base and have a prior; the others take no part."""
    movers = inputs.movers(rule.priors)
    moving, its = inputs.of(movers), rule.of(movers)
    merge = merge if len(movers) > 1 else _merge_one
    try:
        part = merge(moving, its, scale, out)
    except FloatingPointError:  # float32 may be too narrow for squares
        part = merge(moving.widened(), its, scale, out)
    norms = torch.zeros(len(inputs.experts), dtype=torch.float64, device="cpu")
    products = torch.zeros_like(norms)
    for t in set(range(len(norms))).difference(movers):
        norms[t] = squared_norms(inputs.base, [inputs.experts[t]])[0]
    norms[movers], products[movers] = part.norms, part.products
    return replace(part, norms=norms, products=products)


_Merge = Callable[[MatrixInputs, Rule, float, Tensor | None], "_Part"]


@dataclass(frozen=True)
class _Part:
    """What a merged matrix comes to: ‖τ_t‖² and ⟨M, τ_t⟩, T float64 each; ‖M‖²; n and K."""

    norms: Tensor
    products: Tensor
    squared_norm: float
    inputs: int
    decided: int = 0


def _merge_rows(inputs: MatrixInputs, rule: Rule, scale: float, out: Tensor | None) -> _Part:
    """Merge with a coefficient for each row: every S_t is diagonal, so nothing is amplified."""
    squares = [block.squares() for block in inputs.blocks()]
    norms = inputs.row_norms(squares).sum(1)
    traces = rule.traces(norms.tolist())
    factors = [c / q if q else 0.0 for c, q in zip(traces, norms.tolist(), strict=True)]
    products, length = torch.zeros_like(norms), 0.0
    for block, square in zip(inputs.blocks(), squares, strict=True):
        shares = square * square.new_tensor(factors).unsqueeze(1)
        shares /= shares.sum(0).clamp_min_(torch.finfo(shares.dtype).tiny)
        shares *= shares.new_tensor(rule.priors).unsqueeze(1)
        merged = block.spare.zero_()
        for tau, share in zip(block.task_vectors, shares, strict=True):
            merged.addcmul_(tau, share.unsqueeze(1))
        products += block.task_vectors.mul_(merged).sum(2).cpu().double().sum(1)
        length += float(torch.mul(merged, merged, out=block.task_vectors[0]).sum(1).double().sum())
        if out is not None:
            out[block.rows] = merged.mul_(scale).add_(block.base)
    return _Part(norms, products, length, inputs.base.shape[1])


def _merge_one(inputs: MatrixInputs, rule: Rule, scale: float, out: Tensor | None) -> _Part:
    """Merge at most one expert: what it moves is added whole."""
    norms = squared_norms(inputs.base, inputs.experts)
    norms, priors = torch.tensor([norms, rule.priors], dtype=torch.float64, device="cpu")
    if out is not None:
        out.copy_(add_task_vectors(inputs.base, inputs.experts, rule.priors, scale))
    return _Part(norms, priors * norms, float(priors.square() @ norms), inputs.base.shape[1])


def _merge_matrix(inputs: MatrixInputs, rule: Rule, scale: float, out: Tensor | None) -> _Part:
    rows = drawn_rows(inputs)
    basis = basis_of(inputs, rows)
    squares, gram, projected = _read(inputs, basis)
    if (longest := longest_rows(squares, rows)) is not None:
        basis = basis_of(inputs, longest)
        squares, gram, projected = _read(inputs, basis)
    norms = gram.diagonal()
    found = solve(projected, gram, rule)
    if out is not None:
        left, right = scale * found.left, (basis @ found.directions).T
        first, *others = (scale * share for share in found.elsewhere)
        for block in inputs.blocks():
            merged = torch.mul(block.task_vectors[0], first, out=block.spare)
            for tau, share in zip(block.task_vectors[1:], others, strict=True):
                merged.add_(tau, alpha=share)
            block.add_product(left[block.rows], right)
            out[block.rows] = merged.add_(block.base)
    n, decided = len(basis), found.directions.shape[1]
    return _Part(norms, found.products, found.squared_norm, n, decided)


def _read(inputs: MatrixInputs, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read a matrix once.

    Returns:
        The squared length of each row of τ_t, T x m float64; ⟨τ_t, τ_k⟩, T x T float64; and
        P_t = τ_t Q, T x m x q.
    """
    count, m, q = len(inputs.experts), len(inputs.base), basis.shape[1]
    gram = basis.new_zeros(count, count)
    projected = basis.new_empty(count, m, q)
    squares = []
    for block in inputs.blocks():
        for product, tau in zip(projected[:, block.rows], block.task_vectors, strict=True):
            torch.mm(tau, basis, out=product)
        gram += block.products()
        squares.append(block.squares())
    by_row = inputs.row_norms(squares)
    gram = gram.cpu().double()
    gram.diagonal().copy_(by_row.sum(1))
    return by_row, gram, projected


def _summarized(parts: Sequence[_Part], scale: float, is_matrix: bool) -> Directions:
    """Return the figures of all matrices of a tensor together."""
    norms = torch.stack([part.norms for part in parts]).sum(0).tolist()
    if not all(map(math.isfinite, norms)):
        raise FloatingPointError("A number is not finite, or too large to be squared.")
    products = torch.stack([part.products for part in parts]).sum(0).tolist()
    return Directions(
        squared_norms=tuple(norms),
        kept=tuple(scale * p / q if q else 0.0 for p, q in zip(products, norms, strict=True)),
        squared_norm=scale**2 * math.fsum(part.squared_norm for part in parts),
        scale=scale,
        decided=sum(part.decided for part in parts) if is_matrix else None,
        inputs=sum(part.inputs for part in parts),
    )
