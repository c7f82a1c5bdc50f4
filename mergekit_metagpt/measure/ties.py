"""Tied tensors: one tensor of a model under several names. It counts once."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_metagpt.measure.tensors import Device, Measured


class Models(Protocol):
    """A base and its experts; see :class:`mergekit_metagpt.measure.checkpoints.Checkpoints`."""

    @property
    def models(self) -> Sequence[ModelReference]:
        """The base, then the experts."""

    def weights(self) -> list[WeightInfo]:
        """Return the parameters to compare."""

    def stored_name(self, model: ModelReference, weight: WeightInfo) -> str | None:
        """Return the name under which a model stores a weight, or None."""

    def load(self, model: ModelReference, weight: WeightInfo, device: Device) -> Tensor | None:
        """Return a weight as it is stored, or None."""


def named_once(models: Models) -> tuple[list[WeightInfo], dict[str, str]]:
    """Return each stored weight once, and a map from every tied name to that weight's name."""
    weights: dict[tuple[str | None, ...], WeightInfo] = {}
    tied: dict[str, str] = {}
    for weight in models.weights():
        names = tuple(models.stored_name(model, weight) for model in models.models)
        # A weight without a stored name is computed from others, so it is tied to none.
        first = weights.setdefault((weight.name, None) if None in names else names, weight)
        if first is not weight:
            tied[weight.name] = first.name
    return list(weights.values()), tied


def twin_of(
    models: Models,
    weight: WeightInfo,
    others: Sequence[WeightInfo],
    measured: Mapping[str, Measured],
    tensor: Measured,
) -> WeightInfo | None:
    """Return a weight that equals this one in every model, since it is stored twice; or None.

    Args:
        models: the base and its experts.
        weight: the weight.
        others: weights that it may be tied to.
        measured: what those measure, by name.
        tensor: what this one measures. Only tensors with the same norms are compared.
    """
    if not any(tensor.norms):
        return None
    same = (other for other in others if measured[other.name].norms == tensor.norms)
    return next((other for other in same if _are_equal(models, weight, other)), None)


def _are_equal(models: Models, weight: WeightInfo, other: WeightInfo) -> bool:
    return all(
        torch.equal(first, second)
        for model in models.models
        if (first := models.load(model, weight, "cpu")) is not None
        and (second := models.load(model, other, "cpu")) is not None
    )
