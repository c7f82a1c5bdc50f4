"""In which directions of a matrix the coefficients decide, and what: the algebra of the rule.

It works on a few hundred directions per matrix, so it knows nothing of the sizes, blocks and
dtypes of whole tensors; see :mod:`mergekit_metagpt.core.directions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_metagpt.core.coefficients import scaling_coefficients

# Directions count by this power of their eigenvalue.
_POWER = 0.75
# If the merge would move farther in K directions than the experts do, by more than this part of all
# that they move, it amplifies what they do not determine. Then fewer directions are decided.
_FARTHER = 0.2
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Rule:
    """How the coefficients follow from the task vectors of a tensor.

    Attributes:
        priors: w_t, T finite floats of at least 0.
        exponent: k ≥ 0 in λ_t ∝ w_t ‖τ_t‖^k, which decides in matrices.
    """

    priors: Sequence[float]
    exponent: float = 0.0

    def of(self, experts: Sequence[int]) -> "Rule":
        """Return the rule for some of the experts."""
        return replace(self, priors=[self.priors[t] for t in experts])

    def traces(self, squared_norms: Sequence[float]) -> list[float]:
        """Return λ_t = tr S_t, T floats, from positive squared norms."""
        return scaling_coefficients(squared_norms, self.priors, self.exponent)


@dataclass(frozen=True)
class Solution:
    """M = Σ_t c_t τ_t + H Vᵀ Qᵀ.

    Attributes:
        elsewhere: c_t, T floats.
        left: H, m x K.
        directions: V, q x K, with orthonormal columns.
        products: ⟨M, τ_t⟩, T float64.
        squared_norm: ‖M‖².
    """

    elsewhere: Sequence[float]
    left: Tensor
    directions: Tensor
    products: Tensor
    squared_norm: float


def solve(projected: Tensor, gram: Tensor, rule: Rule) -> Solution:
    """Decide in the K leading directions, and add up elsewhere.

    ``projected`` are P_t, T x m x q; ``gram`` holds ⟨τ_t, τ_k⟩, T x T in float64.
    """
    norms = gram.diagonal()
    factors = gram.new_tensor(rule.traces(norms.tolist())) / norms.clamp_min(_TINY)
    priors = gram.new_tensor(rule.priors)
    energies = (projected.mT @ projected).cpu().double() * factors.view(-1, 1, 1)
    values, vectors = torch.linalg.eigh(energies.sum(0))
    values, vectors = values.flip(0).clamp_min_(_TINY), vectors.flip(1)
    weights = values**_POWER
    weights = weights / weights.max()
    # The participation number: how many of them carry their sum.
    found = max(1, round(float(weights.sum() ** 2 / weights.square().sum())))
    while True:
        directions = vectors[:, :found]
        # What each expert wants, in proportion to its prior. T x K x K
        shares = priors.view(-1, 1, 1) * (directions.T @ energies @ directions) / values[:found]
        inside = projected @ directions.to(projected)  # τ_t Q V, T x m x K
        decided = (inside @ shares.to(projected)).sum(0)
        farther = float(decided.square().sum() - inside.square().sum())
        if found == 1 or farther <= _FARTHER * float(gram.trace()):
            break
        found -= max(1, found // 8)
    flat = inside.flatten(1)
    elsewhere = _shares(gram - (flat @ flat.T).cpu().double(), priors)
    left = decided - (elsewhere.to(flat) @ flat).view_as(decided)
    along = (flat @ left.flatten()).cpu().double()  # ⟨H, τ_t Q V⟩
    products = gram @ elsewhere + along
    # ‖M‖² = c·(G c + 2 along) + ‖H‖²
    length = float(elsewhere @ (products + along)) + float(left.square().sum())
    return Solution(elsewhere.tolist(), left, directions.to(projected), products, length)


def _shares(gram: Tensor, priors: Tensor) -> Tensor:
    """Return c_t = 1 / Σ_k cos²(τ_t, τ_k), T float64: 1, but experts that move alike share it.

    Of experts that move differently, as much is added as their priors say, from 0 to 1.
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    alike = (gram / torch.outer(lengths, lengths).clamp_min_(_TINY)).square_().clamp_(max=1)
    alike.fill_diagonal_(1)
    return priors / (alike @ priors).clamp_min(1)
