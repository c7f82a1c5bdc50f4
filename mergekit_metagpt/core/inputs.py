"""One tensor of a base and of its experts."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.task_vectors import promoted_dtype, squared_norms
from mergekit_metagpt.names import canonical

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup


@dataclass(frozen=True)
class TensorInputs:
    """One tensor of the base and of T experts.

    Attributes:
        name: the tensor's name; None if it has none.
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
        """Split a MergeKit group into its base and its experts."""
        name, base = group.metadata.name, group.base
        if base is None:
            raise ValueError(f"Tensor {name} has no base; set base_model.")
        tensors: dict[Hashable, Tensor] = {entry.id: entry.tensor for entry in group.non_base}
        ids = tuple(canonical(tensors))
        return cls(name, base.id, base.tensor, ids, tuple(tensors[id_] for id_ in ids))

    @cached_property
    def squared_norms(self) -> Norms:
        """‖θ_t − θ_0‖², T finite floats, measured on first use; NaN or Inf raise ``not_finite``."""
        norms = squared_norms(self.base, self.experts)
        if not all(map(math.isfinite, norms)):
            raise self.not_finite()
        return tuple(norms)

    def not_finite(self) -> ValueError:
        """Return an error that names the model whose numbers cannot be squared."""
        for model, tensor in self:
            if not tensor.isfinite().all():
                return ValueError(
                    f"Tensor {self.name} of model {model} holds NaN or Inf in {tensor.dtype}; "
                    "repair or replace that checkpoint, leave the model out of the merge, or, "
                    "if its numbers are only too large for the config's dtype, set a wider one."
                )
        return ValueError(
            f"The task vectors of tensor {self.name} are too large to be squared in float64; "
            f"check the values of {', '.join(str(model) for model, _ in self)}."
        )

    @property
    def memory(self) -> tuple[Any, ...]:
        """Where the tensors lie; the same for tensors that are tied in memory."""
        return tuple(place_of(tensor) for _, tensor in self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all tensors promote to."""
        return promoted_dtype([self.base, *self.experts])

    def __iter__(self) -> Iterator[tuple[Hashable, Tensor]]:
        """Yield id and tensor of the base, then of each expert."""
        yield self.base_id, self.base
        yield from zip(self.ids, self.experts, strict=True)


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies in memory; two with the same place have the same content."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
