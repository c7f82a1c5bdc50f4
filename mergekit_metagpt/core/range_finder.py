"""Where the experts of a matrix move: a randomized range finder, in a sample of the rows.

N. Halko, P. G. Martinsson and J. A. Tropp, "Finding structure with randomness", SIAM Review 53,
2011, arXiv 0909.4061. Any basis of nearly the same span serves, so it need not be exact.
"""

import torch
from torch import Tensor

from mergekit_metagpt.core.matrices import MatrixInputs

# How many leading directions of each expert are looked for.
RANK = 8
# They are looked for in a sixteenth of the rows, but in at least 256, or all if there are fewer.
_ONE_ROW_OF, _LEAST_ROWS = 16, 256
# A sample in which an expert moves in fewer rows may miss what matters.
_ENOUGH_ROWS = 64
# The range finder squares singular values in float32. Squares of so small a part of the largest
# may be rounding errors.
_NOISE = 1e-6


def drawn_rows(inputs: MatrixInputs) -> Tensor | None:
    """Return the rows to look at, drawn by the inputs' seed; None for all of them."""
    m = len(inputs.base)
    if m <= _LEAST_ROWS or _may_move_everywhere(inputs):
        return None
    generator = torch.Generator("cpu").manual_seed(inputs.seed)
    order = torch.randperm(m, generator=generator, device="cpu")
    return order[: max(_LEAST_ROWS, m // _ONE_ROW_OF)]


def longest_rows(squares: Tensor, drawn: Tensor | None) -> Tensor | None:
    """Return rows to look at in place of those drawn, or None if those are good.

    Such rows are those of new tokens in a head, which move far beyond the others; a sample hardly
    has any. In how many rows an expert moves is the participation number of their shares in its
    squared norm.

    Args:
        squares: the squared length of each row of τ_t, T x m.
        drawn: the rows that were looked at; None if all were.
    """
    if drawn is None:
        return None
    shares = squares / squares.sum(1, keepdim=True)
    moving = 1 / float(shares.square().sum(1).max())
    if len(drawn) * moving >= _ENOUGH_ROWS * squares.shape[1]:
        return None
    return shares.sum(0).topk(len(drawn)).indices


def basis_of(inputs: MatrixInputs, rows: Tensor | None) -> Tensor:
    """Return Q, n x q: orthonormal directions that span where the experts move in these rows.

    q is at most T r. If T r ≥ n, the experts may move everywhere: Q is the identity. None stands
    for all rows.

    Raises:
        FloatingPointError: if products are out of the range of the inputs' dtype.
    """
    if _may_move_everywhere(inputs):
        n = inputs.base.shape[1]
        return torch.eye(n, dtype=inputs.dtype, device=inputs.base.device)
    ranges = _ranges(inputs, rows)
    ranges /= ranges.abs().amax((1, 2), keepdim=True).clamp_min_(torch.finfo(ranges.dtype).tiny)
    basis, mixtures = torch.linalg.qr(ranges.flatten(0, 1).T)
    # The rest of an expert of a lower rank, or of one like another, is noise, not a direction.
    turns, lengths, _ = torch.linalg.svd(mixtures.cpu().double())
    span: Tensor = basis @ turns[:, lengths >= _NOISE * lengths[0]].to(basis)
    return span


def _may_move_everywhere(inputs: MatrixInputs) -> bool:
    """Return whether T r ≥ n: what is looked for may be all directions that there are."""
    return len(inputs.experts) * RANK >= inputs.base.shape[1]


def _ranges(inputs: MatrixInputs, rows: Tensor | None) -> Tensor:
    """Return (R_tᵀ R_t Ω)ᵀ with a random Ω, T x r x n; R_t are these rows of τ_t.

    It consists of mixtures of their input directions, by the squares of their singular values.
    """
    generator = torch.Generator("cpu").manual_seed(inputs.seed)
    n = inputs.base.shape[1]
    drawn = torch.randn(RANK, n, generator=generator, dtype=torch.float32, device="cpu")
    drawn = drawn.to(inputs.base.device, inputs.dtype)
    ranges = drawn.new_zeros(len(inputs.experts), RANK, n)
    for block in (inputs if rows is None else inputs.copy_of(rows)).blocks():
        for tau, sums in zip(block.task_vectors, ranges, strict=True):
            sums.addmm_((tau @ drawn.T).T, tau)  # a few long rows: the fastest layout
    if not ranges.isfinite().all():
        raise FloatingPointError(
            f"The directions of a matrix are out of the range of {inputs.dtype}."
        )
    return ranges
