"""Surveys: the squared norms of whole models' task vectors, tensor by tensor."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.names import layer_of


@dataclass(frozen=True)
class Surveyed:
    """The task vectors of a tensor that need not be loaded, since a survey has measured them."""

    name: str
    ids: tuple[Hashable, ...]
    squared_norms: Norms
    dtype: torch.dtype


@dataclass(frozen=True)
class Survey:
    """The squared norms ‖θ_t − θ_0‖² of T experts' task vectors, per tensor.

    Attributes:
        experts: T model ids.
        squared_norms: T floats for each tensor name, in the order of ``experts``. Of a set of
            tied tensors, only one is listed.
        tied: maps the other tied tensors to the listed one.
        dtypes: for each tensor name, the dtype that the stored base and experts promote to.
        left_out: why vocabulary tensors could not be compared, by name.
        sizes: the number of elements for each tensor name.
        grams: the T x T inner products ⟨τ_i, τ_j⟩ for each tensor name; None if not measured.
        bases: ‖θ_0‖² for each tensor name; measured with the inner products.
    """

    experts: tuple[Hashable, ...]
    squared_norms: Mapping[str, Norms]
    tied: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    grams: Mapping[str, Sequence[Sequence[float]]] | None = None
    bases: Mapping[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of elements measured."""
        return sum(self.sizes.values())

    @cached_property
    def products(self) -> tuple[Norms, ...]:
        """The T x T inner products ⟨τ_i, τ_j⟩ over the whole model; empty if not measured."""
        rows = zip(*(self.grams or {}).values(), strict=True)
        return tuple(tuple(map(math.fsum, zip(*row, strict=True))) for row in rows)

    def norms_of(self, tensor: TensorInputs | Surveyed, granularity: str) -> Norms:
        """Return ‖τ_t‖² over the scope that a tensor belongs to, T floats.

        Raises:
            ValueError: if the tensor was not surveyed, or was rounded since then, and now holds
                NaN or Inf.
        """
        # A tensor that several layers share has the coefficients of the first of them.
        name = self.tied.get(tensor.name or "", tensor.name or "")
        stored = self.dtypes.get(name)
        if stored is None or torch.promote_types(stored, tensor.dtype) != tensor.dtype:
            _ = tensor.squared_norms  # raises the error
        sums = {"layer": self.layers, "model": {"model": self.model}}[granularity]
        return sums.get(GRANULARITIES[granularity].scope(name)) or tensor.squared_norms

    def in_order_of(self, experts: Sequence[Hashable]) -> "Survey":
        """Return the survey of these of its experts, in this order."""
        places = [self.experts.index(expert) for expert in experts]
        norms = {n: tuple(row[i] for i in places) for n, row in self.squared_norms.items()}
        grams = self.grams and {
            name: [[gram[i][j] for j in places] for i in places]
            for name, gram in self.grams.items()
        }
        return replace(self, experts=tuple(experts), squared_norms=norms, grams=grams)

    def of_some(self, experts: Sequence[Hashable]) -> "Survey | None":
        """Return the survey of some of the experts, or None if they have to be measured anew.

        Without the others, vocabularies may agree that do not now. And tensors may be tied that
        are not now, or the other way round: tensors that no expert moved are never tied.
        """
        if not set(experts) <= set(self.experts):
            return None
        some = self.in_order_of(experts)
        if set(experts) == set(self.experts):
            return some
        if self.left_out:
            return None
        moved = {name: row for name, row in some.squared_norms.items() if any(row)}
        if len({(some.sizes[name], row) for name, row in moved.items()}) < len(moved):
            return None
        frozen = (
            name not in moved and any(self.squared_norms[name]) for name in self.tied.values()
        )
        return None if any(frozen) else some

    @cached_property
    def model(self) -> Norms:
        """T floats: the squared norms over the whole model, as in Theorem 10."""
        return self._sum(self.squared_norms)

    @property
    def moved(self) -> list[float] | None:
        """‖τ_t‖ / ‖θ_0‖ over the whole model, T floats; None if ‖θ_0‖ is 0 or not known."""
        base = math.fsum(self.bases.values())
        return [math.sqrt(norm / base) for norm in self.model] if base else None

    @cached_property
    def layers(self) -> dict[str, Norms]:
        """T floats for each layer. Tensors outside the layers are not included."""
        members: dict[str, list[str]] = {}
        for name in self.squared_norms:
            if (layer := layer_of(name)) is not None:
                members.setdefault(layer, []).append(name)
        return {layer: self._sum(names) for layer, names in members.items()}

    @property
    def cosines(self) -> list[list[float]]:
        """The T x T cosines between the task vectors; 0 for a zero vector.

        Property 6 assumes that they are 0 for i ≠ j. Empty without inner products.
        """
        lengths = [math.sqrt(row[t]) for t, row in enumerate(self.products)]
        return [
            [value / (a * b) if a * b else 0.0 for value, b in zip(row, lengths, strict=True)]
            for row, a in zip(self.products, lengths, strict=True)
        ]

    def _sum(self, names: Iterable[str]) -> Norms:
        rows = [self.squared_norms[name] for name in names]
        # fsum rounds only once, so the order of the tensors does not matter.
        return tuple(math.fsum(row[t] for row in rows) for t in range(len(self.experts)))
