"""Surveys: the squared norms of whole models' task vectors, tensor by tensor."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.names import grouped, layer_of


@dataclass(frozen=True)
class Measured:
    """The task vectors of one tensor of a base and T experts, measured."""

    norms: Norms  # ‖τ_t‖², T floats
    dtype: torch.dtype  # that the stored tensors promote to
    size: int  # the number of elements
    products: Sequence[Sequence[float]] = ()  # ⟨τ_i, τ_j⟩, T x T; empty if not measured
    base: float = 0.0  # ‖θ_0‖²; measured with the products

    @classmethod
    def of(cls, inputs: TensorInputs) -> "Measured":
        """Measure a tensor, without inner products; one that is not finite is a ValueError."""
        return cls(inputs.squared_norms, inputs.dtype, inputs.base.numel())


@dataclass(frozen=True)
class Survey:
    """The task vectors τ_t = θ_t − θ_0 of T experts, measured per tensor."""

    experts: tuple[Hashable, ...]  # T model ids, in the order of all figures
    tensors: Mapping[str, Measured]  # by name; of a set of tied tensors, only one is listed
    tied: Mapping[str, str] = field(default_factory=dict)  # the others, and the listed one
    left_out: Mapping[str, str] = field(default_factory=dict)  # vocabulary tensors, and why

    @property
    def parameters(self) -> int:
        """The number of elements measured."""
        return sum(it.size for it in self.tensors.values())

    @property
    def has_products(self) -> bool:
        """Whether inner products were measured."""
        return all(it.products for it in self.tensors.values())

    @cached_property
    def products(self) -> tuple[Norms, ...]:
        """The T x T inner products ⟨τ_i, τ_j⟩ over the whole model; empty if not measured."""
        rows = zip(*(it.products for it in self.tensors.values()), strict=True)
        return tuple(tuple(map(math.fsum, zip(*row, strict=True))) for row in rows)

    def over_scope(self, name: str, granularity: str) -> Norms | None:
        """Return ‖τ_t‖² over the scope of a tensor, T floats; None if it is the tensor alone.

        A tensor that several layers share has the coefficients of the first of them.
        """
        if granularity == "model":
            return self.model
        layer = layer_of(self.tied.get(name, name))
        return self.layers.get(layer) if layer and granularity == "layer" else None

    def norms_of(self, tensor: TensorInputs, granularity: str) -> Norms:
        """Return ‖τ_t‖² over the scope that a tensor belongs to, T floats.

        Raises:
            ValueError: if the tensor was not surveyed, or was rounded since then, and now holds
                NaN or Inf.
        """
        name = tensor.name or ""
        stored = self.tensors.get(self.tied.get(name, name))
        if stored is None or torch.promote_types(stored.dtype, tensor.dtype) != tensor.dtype:
            _ = tensor.squared_norms  # raises the error
        return self.over_scope(name, granularity) or tensor.squared_norms

    def in_order_of(self, experts: Sequence[Hashable]) -> "Survey":
        """Return the survey of these of its experts, in this order."""
        places = [self.experts.index(expert) for expert in experts]
        tensors = {
            name: replace(
                it,
                norms=tuple(it.norms[i] for i in places),
                products=[[it.products[i][j] for j in places] for i in places if it.products],
            )
            for name, it in self.tensors.items()
        }
        return replace(self, experts=tuple(experts), tensors=tensors)

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
        moved = {name: it for name, it in some.tensors.items() if any(it.norms)}
        if len({(it.size, it.norms) for it in moved.values()}) < len(moved):
            return None
        frozen = (
            name not in moved and any(self.tensors[name].norms) for name in self.tied.values()
        )
        return None if any(frozen) else some

    @cached_property
    def model(self) -> Norms:
        """T floats: the squared norms over the whole model, as in Theorem 10."""
        return self._sum(self.tensors.values())

    @property
    def moved(self) -> list[float] | None:
        """‖τ_t‖ / ‖θ_0‖ over the whole model, T floats; None if ‖θ_0‖ is 0 or not known."""
        base = math.fsum(it.base for it in self.tensors.values())
        return [math.sqrt(norm / base) for norm in self.model] if base else None

    @cached_property
    def layers(self) -> dict[str, Norms]:
        """T floats for each layer. Tensors outside the layers are not included."""
        by_layer = grouped((layer_of(name), it) for name, it in self.tensors.items())
        return {layer: self._sum(its) for layer, its in by_layer.items() if layer}

    @property
    def cosines(self) -> list[list[float]]:
        """The T x T cosines between the task vectors; 0 for a zero vector, empty if not measured.

        Property 6 assumes that they are 0 for i ≠ j.
        """
        lengths = [math.sqrt(row[t]) for t, row in enumerate(self.products)]
        return [
            [value / (a * b) if a * b else 0.0 for value, b in zip(row, lengths, strict=True)]
            for row, a in zip(self.products, lengths, strict=True)
        ]

    def _sum(self, tensors: Collection[Measured]) -> Norms:
        # fsum rounds only once, so the order of the tensors does not matter.
        count = len(self.experts)
        return tuple(math.fsum(it.norms[t] for it in tensors) for t in range(count))
