"""What MergeKit does not pass to a method: it calls it with one tensor of each model at a time.

The methods ask one provider, which they get when they are registered.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.inputs import TensorInputs


class Models(Protocol):
    """The models that tensors are from."""

    @property
    def parameters(self) -> int | None:
        """How many numbers the base holds; None for models in memory."""

    def squared_norms(self, tensor: TensorInputs, granularity: str) -> Norms:
        """Return ‖τ_t‖² over the tensor's scope, T finite floats."""

    def shape_of(self, tensor: str) -> Sequence[int] | None:
        """Return the shape of a tensor of the base, or None if it has none, or only as a twin."""

    @property
    def twins(self) -> Mapping[str, str]:
        """The heads that are stored beside the embeddings that they are, and these."""

    def merged_as(self, parameters: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return for each tensor the number of the one whose merge is also its own."""


class Provider(Protocol):
    """Finds the models of a merge."""

    def begin(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Prepare for a merge that MergeKit plans."""

    def require_unchanged(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Stop a merge if its files have changed since then."""

    def models_of(self, tensors: Sequence[TensorInputs]) -> Models:
        """Return the models that tensors are from."""
