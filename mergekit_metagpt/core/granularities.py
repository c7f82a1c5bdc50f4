"""Granularities: a class for each choice of which tensors share scaling coefficients.

To add one, write its class here and add it to :data:`GRANULARITIES`. The config's parameter,
the commands' options, ``check``, the forecast and the record take it from there.

This module does not import torch, because the commands list the names before they import it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.names import layer_of


class TaskVectors(Protocol):
    """The task vectors of one tensor, with what a granularity needs to know of them."""

    @property
    def name(self) -> str | None:
        """The tensor's name in the output."""

    @property
    def dtype(self) -> Any:
        """The torch dtype in which it is merged."""

    @property
    def squared_norms(self) -> Norms:
        """‖τ_t‖², T finite floats; measured on first use."""

    def is_surveyed_in(self, survey: Any) -> bool:
        """Return whether a survey measured these tensors under this name."""


class Surveyed(Protocol):
    """The squared norms of whole models' task vectors; see :class:`mergekit_metagpt.Survey`."""

    @property
    def layers(self) -> Mapping[str, Norms]:
        """T floats for each layer."""

    @property
    def model(self) -> Norms:
        """T floats for the whole model."""

    def counted_as(self, tensor: str | None) -> str | None:
        """Return the name under which a tensor is listed; it differs if the tensor is tied."""

    def knows(self, tensor: str | None, dtype: Any) -> bool:
        """Return whether a tensor was measured and ``dtype`` holds its stored values exactly."""


class Granularity(ABC):
    """A choice of which tensors share coefficients: all tensors of a scope do.

    Attributes:
        name: the value of ``granularity`` in a config.
        needs_survey: whether the whole models are measured before they are merged.
        keeps_layers: whether every layer must keep its place in the merge.
        by_direction: whether every direction of a tensor has a coefficient, not the tensor.
        default_exponent: k in λ_t ∝ w_t ‖τ_t‖^k, where a config sets none.
    """

    name: ClassVar[str]
    needs_survey: ClassVar[bool] = True
    keeps_layers: ClassVar[bool] = False
    by_direction: ClassVar[bool] = False
    default_exponent: ClassVar[float] = 2.0

    @abstractmethod
    def scope(self, tensor: str) -> str:
        """Return the name of the scope that a tensor belongs to."""

    @abstractmethod
    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return ‖τ_t‖² over a tensor's scope, T floats.

        Args:
            tensor: the task vectors of the tensor to merge.
            survey: returns the survey of the whole models. Call it before you measure the
                tensor, to save memory.

        Raises:
            ValueError: if the tensor holds NaN or Inf, or if its scope is unknown.
        """


class PerTensor(Granularity):
    """Each tensor has its own coefficients, computed from the tensors in the merge."""

    name = "tensor"
    needs_survey = False

    def scope(self, tensor: str) -> str:
        """Return the tensor's own name."""
        return tensor

    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return the tensor's own norms."""
        return tensor.squared_norms


class PerDirection(PerTensor):
    """Every direction of a tensor has its own; see :mod:`mergekit_metagpt.core.directions`."""

    name = "direction"
    by_direction = True
    default_exponent = 0.0


class PerLayer(Granularity):
    """The tensors of a decoder layer share coefficients; any other tensor has its own."""

    name = "layer"
    keeps_layers = True

    def scope(self, tensor: str) -> str:
        """Return the layer's name, or the tensor's own name outside the layers."""
        return layer_of(tensor) or tensor

    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return the norms of the tensor's layer.

        Raises:
            ValueError: if the survey measured different tensors under this name.
        """
        whole = survey()
        if layer_of(tensor.name) is None:
            return tensor.squared_norms
        if not tensor.is_surveyed_in(whole):
            raise ValueError(
                f"Granularity layer cannot choose the coefficients of {tensor.name}: the slices "
                f"of this merge put a different layer there than the one that {tensor.name} of "
                "the base belongs to. Use granularity: tensor or granularity: model."
            )
        _require_finite(tensor, whole)
        # A tensor that several layers share has the coefficients of the first of them.
        layer = layer_of(whole.counted_as(tensor.name))
        return whole.layers[layer] if layer else tensor.squared_norms


class PerModel(Granularity):
    """All tensors share one set of coefficients: exactly Theorem 10 of the paper."""

    name = "model"

    def scope(self, tensor: str) -> str:
        """Return ``model``."""
        return self.name

    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return the norms over the whole model."""
        whole = survey()
        _require_finite(tensor, whole)
        return whole.model


def _require_finite(tensor: TaskVectors, survey: Surveyed) -> None:
    """Check a tensor for NaN and Inf if it was not surveyed, or was rounded since then."""
    if not survey.knows(tensor.name, tensor.dtype):
        _ = tensor.squared_norms  # raises the error


GRANULARITIES: dict[str, Granularity] = {
    granularity.name: granularity
    for granularity in (PerTensor(), PerLayer(), PerModel(), PerDirection())
}
