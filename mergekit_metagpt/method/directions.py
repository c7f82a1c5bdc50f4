"""One tensor merged by directions, with the parameters of a merge method."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mergekit_metagpt.core.decision import Rule
from mergekit_metagpt.core.directions import Directions, merge_directions
from mergekit_metagpt.core.roles import ShapeOf, role_of
from mergekit_metagpt.measure.survey import TensorInputs
from mergekit_metagpt.method.parameters import exponent_of


def by_directions(
    inputs: TensorInputs,
    shape_of: ShapeOf,
    parameters: Mapping[str, Any],
    out: Tensor | None = None,
) -> Directions:
    """Merge a tensor with a coefficient for every direction.

    Args:
        inputs: θ_0 and θ_t.
        shape_of: returns the shape of another tensor of the base.
        parameters: those of the method, with the priors w_t as ``weight``.
        out: where the merge is written; None computes its figures only.

    Raises:
        ValueError: if an input is not finite.
    """
    role = role_of(inputs.name, inputs.base.shape, shape_of)
    priors = [parameters["weight"][expert] for expert in inputs.ids]
    rule = Rule(priors, exponent_of(parameters))
    try:
        return merge_directions(
            inputs.base,
            inputs.experts,
            rule,
            role=role,
            name=inputs.name,
            scale=parameters["lambda"],
            out=out,
        )
    except FloatingPointError as error:
        raise inputs.not_finite() from error
