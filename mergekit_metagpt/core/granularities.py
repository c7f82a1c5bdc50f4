"""Granularities: the choices of which tensors share scaling coefficients.

To add one, add it to :data:`GRANULARITIES`. The parameter, the options, ``check``, the forecast
and the record take it from there. Its norms come from :meth:`Survey.norms_of`.

This module does not import torch, because the commands list the names before they import it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mergekit_metagpt.names import layer_of


@dataclass(frozen=True)
class Granularity:
    """A choice of which tensors share coefficients: all tensors of a scope do.

    Attributes:
        scope: returns the name of the scope that a tensor belongs to.
        needs_survey: whether the whole models are measured before they are merged.
        keeps_layers: whether every layer must keep its place in the merge.
        by_direction: whether every direction of a tensor has a coefficient, not the tensor.
        default_exponent: k in λ_t ∝ w_t ‖τ_t‖^k, where a config sets none.
    """

    scope: Callable[[str], str]
    needs_survey: bool = False
    keeps_layers: bool = False
    by_direction: bool = False
    default_exponent: float = 2.0


GRANULARITIES = {
    # Each tensor has its own coefficients, computed from the tensors in the merge.
    "tensor": Granularity(lambda tensor: tensor),
    # Those of a decoder layer share coefficients; any other tensor has its own.
    "layer": Granularity(
        lambda tensor: layer_of(tensor) or tensor, needs_survey=True, keeps_layers=True
    ),
    # All share one set of coefficients: exactly Theorem 10 of the paper.
    "model": Granularity(lambda tensor: "model", needs_survey=True),
    # Every direction of a tensor has its own; see :mod:`mergekit_metagpt.core.directions`.
    "direction": Granularity(lambda tensor: tensor, by_direction=True, default_exponent=0.0),
}


def moved(tensor: str | None) -> ValueError:
    """Return the error for a tensor of a layer that slices have moved."""
    return ValueError(
        f"Granularity layer cannot choose the coefficients of {tensor}: the slices of this merge "
        f"put a different layer there than the one that {tensor} of the base belongs to. Use "
        "granularity: tensor or granularity: model."
    )
