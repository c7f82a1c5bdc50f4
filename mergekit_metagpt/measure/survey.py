"""Surveys: the squared norms of whole models' task vectors, tensor by tensor."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_metagpt.coefficients import Norms
from mergekit_metagpt.names import canonical, layer_of
from mergekit_metagpt.task_vectors import squared_norms

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup


@dataclass(frozen=True)
class TensorInputs:
    """One tensor of the base and of T experts.

    Attributes:
        name: the tensor's name, for messages.
        base_id: the base's id.
        base: θ_0.
        ids: the experts' ids, in canonical order.
        experts: θ_t, T tensors of the base's shape and device.
    """

    name: str | None
    base_id: Hashable
    base: Tensor
    ids: tuple[Hashable, ...]
    experts: tuple[Tensor, ...]

    @classmethod
    def of(cls, group: "TensorGroup") -> "TensorInputs":
        """Split one of MergeKit's groups.

        Raises:
            ValueError: if the group has no base.
        """
        name, base = group.metadata.name, group.base
        if base is None:
            raise ValueError(f"Tensor {name} has no base; set base_model.")
        tensors: dict[Hashable, Tensor] = {entry.id: entry.tensor for entry in group.non_base}
        ids = tuple(canonical(tensors))
        return cls(name, base.id, base.tensor, ids, tuple(tensors[id_] for id_ in ids))

    @cached_property
    def squared_norms(self) -> Norms:
        """‖θ_t − θ_0‖², T finite floats, measured when they are first asked for.

        Raises:
            ValueError: if an input holds NaN or Inf; names the model and the tensor.
        """
        norms = squared_norms(self.base, self.experts)
        if not all(map(math.isfinite, norms)):
            for model, tensor in self:
                if not tensor.isfinite().all():
                    raise ValueError(
                        f"Tensor {self.name} of model {model} holds NaN or Inf in {tensor.dtype}; "
                        "repair or replace that checkpoint, leave the model out of the merge, or, "
                        "if its numbers are only too large for the config's dtype, set a wider one."
                    )
            raise ValueError(
                f"The task vectors of tensor {self.name} are too large to be squared in float64; "
                f"check the values of {', '.join(str(model) for model, _ in self)}."
            )
        return tuple(norms)

    def to(self, dtype: torch.dtype) -> "TensorInputs":
        """Return the tensors in another dtype."""
        experts = tuple(tensor.to(dtype) for tensor in self.experts)
        return replace(self, base=self.base.to(dtype), experts=experts)

    def __iter__(self) -> Iterator[tuple[Hashable, Tensor]]:
        """Yield id and tensor of the base, then of each expert."""
        yield self.base_id, self.base
        yield from zip(self.ids, self.experts, strict=True)


@dataclass(frozen=True)
class Survey:
    """The squared norms ‖θ_t − θ_0‖² of T experts' task vectors, per tensor.

    Attributes:
        experts: T model ids, in canonical order.
        squared_norms: for each tensor name T floats, in the order of ``experts``. A tensor
            that is tied to another is listed once.
        dtypes: for each tensor name the dtype that base and experts promote to as stored.
        left_out: vocabulary tensors that could not be compared.
        sizes: for each tensor name how many elements it has.
        grams: for each tensor name the T x T inner products ⟨τ_i, τ_j⟩, if asked for.
    """

    experts: tuple[Hashable, ...]
    squared_norms: Mapping[str, Norms]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    grams: Mapping[str, Sequence[Sequence[float]]] | None = None

    @property
    def parameters(self) -> int:
        """How many elements were measured."""
        return sum(self.sizes.values())

    @cached_property
    def products(self) -> tuple[Norms, ...] | None:
        """The T x T inner products ⟨τ_i, τ_j⟩ over the whole model, if asked for."""
        return None if self.grams is None else sum_matrices(list(self.grams.values()))

    @cached_property
    def model(self) -> Norms:
        """T floats: the squared norms over the whole model, as in Theorem 10."""
        return self._sum(self.squared_norms)

    @cached_property
    def layers(self) -> dict[str, Norms]:
        """For each layer T floats; tensors outside of the layers are not in it."""
        members: dict[str, list[str]] = {}
        for name in self.squared_norms:
            if (layer := layer_of(name)) is not None:
                members.setdefault(layer, []).append(name)
        return {layer: self._sum(names) for layer, names in members.items()}

    @property
    def cosines(self) -> list[list[float]]:
        """T x T cosines of the task vectors (Property 6: 0 where i ≠ j); of a zero vector 0.

        Raises:
            ValueError: if the survey was taken without inner products.
        """
        if self.products is None:
            raise ValueError("This survey holds no inner products; take it with products=True.")
        lengths = [math.sqrt(row[t]) for t, row in enumerate(self.products)]
        return [
            [value / (a * b) if a * b else 0.0 for value, b in zip(row, lengths, strict=True)]
            for row, a in zip(self.products, lengths, strict=True)
        ]

    def _sum(self, names: Iterable[str]) -> Norms:
        rows = [self.squared_norms[name] for name in names]
        # fsum is exact, so that the order of the tensors does not matter.
        return tuple(math.fsum(row[t] for row in rows) for t in range(len(self.experts)))


def sum_matrices(matrices: Sequence[Sequence[Sequence[float]]]) -> tuple[Norms, ...]:
    """Add up matrices of one shape, exactly rounded."""
    return tuple(
        tuple(map(math.fsum, zip(*rows, strict=True))) for rows in zip(*matrices, strict=True)
    )


def survey_groups(
    groups: Sequence["TensorGroup"], dtypes: Sequence[torch.dtype | None] | None = None
) -> Survey:
    """Survey tensors in memory, as MergeKit's ``merge_state_dicts`` holds them.

    Args:
        groups: one MergeKit ``TensorGroup`` per parameter, all with the same base and
            experts. Parameters that share their memory are tied and count once.
        dtypes: for each group what its tensors are cast to first; as they are if not given.

    Returns:
        The survey, with unnamed groups numbered.

    Raises:
        ValueError: if a tensor holds NaN or Inf, or a group has no base.
    """
    return survey_tensors([TensorInputs.of(group) for group in groups], dtypes)


def survey_tensors(
    tensors: Sequence[TensorInputs], dtypes: Sequence[torch.dtype | None] | None = None
) -> Survey:
    """Survey tensors in memory that have been split; see :func:`survey_groups`."""
    experts: tuple[Hashable, ...] = ()
    norms: dict[str, Norms] = {}
    seen = set()
    for number, (inputs, dtype) in enumerate(
        zip(tensors, dtypes or [None] * len(tensors), strict=True)
    ):
        experts = inputs.ids
        memory = tuple((t.data_ptr(), t.shape, t.stride()) for _, t in inputs)
        if inputs.base.numel() and memory in seen:
            continue
        seen.add(memory)
        inputs = inputs if dtype is None else inputs.to(dtype)
        norms[inputs.name or f"#{number}"] = inputs.squared_norms
    return Survey(experts, norms)
