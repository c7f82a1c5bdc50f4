"""The rule of `granularity: direction` with its choices exposed, to change one at a time."""

import math
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.language_model.rules import by_rows, moving

_LEAST_ROWS = 256


@dataclass(frozen=True)
class Look:
    """What is known of a matrix before anything is decided.

    Attributes:
        taus: τ_t, T x m x n, all different from 0.
        gram: ⟨τ_t, τ_k⟩, T x T in float64.
        basis: Q, n x q.
        projected: P_t = τ_t Q, T x m x q.
    """

    taus: Tensor
    gram: Tensor
    basis: Tensor
    projected: Tensor


@dataclass(frozen=True)
class Variant:
    """A rule. The defaults are those of ``mergekit_metagpt.core.directions``.

    Attributes:
        rank: r, how many directions of each expert are looked at.
        of_rows: of how many rows the range finder sees one; it sees 256 at least.
        passes: how often the range finder multiplies by τ_tᵀ τ_t.
        power: the participation number counts eigenvalues by this power of them.
        farther: how much farther the merge may move in K directions than the experts do, as a
            part of all that they move; None for no limit.
        symmetric: beyond the limit, take C^(−1/2) S_t C^(−1/2) in K directions; otherwise, take
            fewer directions.
        elsewhere: c_t: what experts that move alike share, or 1, or 1/√T, or 1/T.
        exponent: k in λ_t ∝ ‖τ_t‖^k.
        rows: what is done with the rows of what is no matrix: a coefficient for each row by the
            bound; the same of tables that are matrices too, the head; added up, but experts that
            move a row alike share it; or the sum.
    """

    rank: int = 8
    of_rows: int = 16
    passes: int = 1
    power: float = 0.75
    farther: float | None = 0.2
    symmetric: bool = False
    elsewhere: Literal["shared", "sum", "sum/√T", "mean"] = "shared"
    exponent: float = 0.0
    rows: Literal["bound", "tables", "shared", "sum"] = "bound"

    def look(self, taus: Tensor, name: str) -> Look:
        """Look at the experts of a matrix; depends on ``rank``, ``of_rows``, ``passes``.

        Args:
            taus: τ_t, T x m x n.
            name: the tensor's name, which decides what the range finder draws.
        """
        taus = moving(taus)
        _, m, n = taus.shape
        drawn = torch.Generator().manual_seed(crc32(f"{name}/{list(taus.shape[1:])}/0".encode()))
        ranges = torch.randn(self.rank, n, generator=drawn).to(taus)
        order = torch.randperm(m, generator=drawn)
        seen = taus[:, order[: max(_LEAST_ROWS, m // self.of_rows)]]
        for _ in range(self.passes):
            ranges = ranges @ seen.mT @ seen
        rows = ranges.flatten(0, 1)
        basis = torch.linalg.qr(rows.T).Q if len(rows) < n else torch.eye(n).to(taus)
        flat = taus.flatten(1)
        gram = (flat @ flat.T).double()
        gram.diagonal().copy_(flat.square().sum(1, dtype=torch.float64))
        return Look(taus, gram, basis, taus @ basis)

    def merge(self, look: Look) -> Tensor:
        """Return the merged task vector of a matrix, m x n."""
        norms = look.gram.diagonal()
        traces = norms ** (self.exponent / 2)
        factors = traces / traces.sum() / norms
        projected = look.projected
        energies = (projected.mT @ projected).double() * factors.view(-1, 1, 1)
        limit = math.inf if self.farther is None else self.farther * float(norms.sum())
        directions, inside, decided = self._decided(projected, energies, limit)
        flat = inside.flatten(1)
        shares = self._elsewhere(look.gram - (flat @ flat.T).double()).to(flat)
        left = decided - torch.tensordot(shares, inside, 1)
        merged: Tensor = torch.tensordot(shares, look.taus, 1)
        return merged.addmm_(left, (look.basis @ directions.to(flat)).T)

    def merge_rows(self, taus: Tensor) -> Tensor:
        """Return the merged task vector, m x n, of what is no matrix."""
        if self.rows in ("bound", "tables"):
            return by_rows(taus, self.exponent)
        if self.rows == "sum":
            return taus.sum(0)
        shares = _shared(torch.einsum("tmn,kmn->mtk", taus, taus).double())
        merged: Tensor = (shares.T.unsqueeze(2).to(taus) * taus).sum(0)
        return merged

    def _decided(
        self, projected: Tensor, energies: Tensor, limit: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return V, q x K; τ_t Q V, T x m x K; and M Q V, m x K."""
        values, vectors = torch.linalg.eigh(energies.sum(0))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        weighed = values**self.power
        count = max(1, round(float(weighed.sum() ** 2 / weighed.square().sum())))
        is_symmetric = False
        while True:
            directions, roots = vectors[:, :count], values[:count].sqrt()
            shares = directions.T @ energies @ directions / roots
            shares /= roots.unsqueeze(1) if is_symmetric else roots
            inside = projected @ directions.to(projected)
            decided = (inside @ shares.to(projected)).sum(0)
            farther = float(decided.square().sum() - inside.square().sum())
            if farther <= limit or count == 1 or is_symmetric:
                return directions, inside, decided
            if self.symmetric:
                is_symmetric = True
            else:
                count -= max(1, count // 8)

    def _elsewhere(self, gram: Tensor) -> Tensor:
        """Return c_t, T, from the inner products of what is left of the task vectors, T x T."""
        count = len(gram)
        if self.elsewhere == "shared":
            return _shared(gram)
        share = {"sum": 1.0, "sum/√T": count**-0.5, "mean": 1 / count}[self.elsewhere]
        return gram.new_full((count,), share)


def _shared(gram: Tensor) -> Tensor:
    """Return 1 / Σ_k cos²(τ_t, τ_k), ... x T, from inner products, ... x T x T."""
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    lengths = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    alike = (gram / lengths.clamp_min(torch.finfo(torch.float64).tiny)).square().clamp(max=1)
    alike.diagonal(dim1=-2, dim2=-1).fill_(1)
    return 1 / alike.sum(-1)
