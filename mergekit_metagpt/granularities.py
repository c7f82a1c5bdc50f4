"""The granularities: the scope that a scaling coefficient is shared over, a class each.

To add one, write its class here and add it to :data:`GRANULARITIES`. The config's parameter,
the commands' options, ``check``, the forecast and the record take it from there.

There is no torch in this module: the commands offer the names before they import it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from mergekit_metagpt.coefficients import Norms
from mergekit_metagpt.names import layer_of


class TaskVectors(Protocol):
    """One tensor's task vectors, as far as a granularity wants to know them."""

    @property
    def name(self) -> str | None:
        """The tensor's name in the output."""

    @property
    def dtype(self) -> Any:
        """The torch dtype that it is merged in."""

    @property
    def squared_norms(self) -> Norms:
        """‖τ_t‖², T finite floats, measured when they are first asked for."""

    def is_surveyed_in(self, survey: Any) -> bool:
        """Return whether these are the tensors that a survey knows by this name."""


class Surveyed(Protocol):
    """The task vectors of whole models; see :class:`mergekit_metagpt.Survey`."""

    @property
    def layers(self) -> Mapping[str, Norms]:
        """T floats for each layer."""

    @property
    def model(self) -> Norms:
        """T floats for the whole model."""

    def counted_as(self, tensor: str | None) -> str | None:
        """Return the name that a tensor is known by, which differs for a tied one."""

    def knows(self, tensor: str | None, dtype: Any) -> bool:
        """Return whether a tensor was measured with no more digits than ``dtype`` has."""


class Granularity(ABC):
    """The scope that a coefficient is shared over.

    Attributes:
        name: the value of ``granularity`` in a config.
        needs_survey: whether the whole models are measured before they are merged.
        keeps_layers: whether every layer has to stay in its place.
    """

    name: ClassVar[str]
    needs_survey: ClassVar[bool] = True
    keeps_layers: ClassVar[bool] = False

    @abstractmethod
    def scope(self, tensor: str) -> str:
        """Return the name of the scope that a tensor belongs to."""

    @abstractmethod
    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return ‖τ_t‖² over a tensor's scope, T floats.

        Args:
            tensor: what is merged.
            survey: returns the survey of the whole models. To call it first takes the least
                memory: a merge that has begun holds tensors.

        Raises:
            ValueError: if the tensor holds NaN or Inf, or the scope cannot be told.
        """


class PerTensor(Granularity):
    """Each tensor has coefficients of its own, from the tensors that are merged."""

    name = "tensor"
    needs_survey = False

    def scope(self, tensor: str) -> str:
        """Return the tensor's own name."""
        return tensor

    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return the tensor's own norms."""
        return tensor.squared_norms


class PerLayer(Granularity):
    """Tensors of a decoder layer share coefficients; the others have their own."""

    name = "layer"
    keeps_layers = True

    def scope(self, tensor: str) -> str:
        """Return the layer's name, or the tensor's outside of any layer."""
        return layer_of(tensor) or tensor

    def squared_norms(self, tensor: TaskVectors, survey: Callable[[], Surveyed]) -> Norms:
        """Return the norms of the tensor's layer.

        Raises:
            ValueError: if the tensors that are merged are not those that the survey knows by
                this name.
        """
        whole = survey()
        if layer_of(tensor.name) is None:
            return tensor.squared_norms
        if not tensor.is_surveyed_in(whole):
            raise ValueError(
                f"Granularity layer cannot choose the coefficients of {tensor.name}: the slices "
                f"of this merge put tensors of another layer there than {tensor.name} of the "
                "base. Use granularity: tensor or granularity: model."
            )
        _require_finite(tensor, whole)
        # Layers that share a tensor share its coefficients too: those of the first of them.
        layer = layer_of(whole.counted_as(tensor.name))
        return whole.layers[layer] if layer else tensor.squared_norms


class PerModel(Granularity):
    """All tensors share one set of coefficients: Theorem 10 of the paper, to the letter."""

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
    """Look for NaN and Inf in what has not been surveyed, or is rounded to fewer digits since."""
    if not survey.knows(tensor.name, tensor.dtype):
        _ = tensor.squared_norms


GRANULARITIES: dict[str, Granularity] = {
    granularity.name: granularity for granularity in (PerTensor(), PerLayer(), PerModel())
}
