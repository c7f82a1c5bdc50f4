"""One tensor of a base and its experts: loaded, compared and measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import inner_products, squared_norm
from mergekit_metagpt.measure.vocabularies import different_rows

Device = torch.device | str


@dataclass(frozen=True)
class Measured:
    """Results for one tensor."""

    norms: Norms  # ‖τ_t‖², T floats
    dtype: torch.dtype  # that the stored tensors promote to
    size: int  # the number of elements
    products: list[list[float]]  # ⟨τ_i, τ_j⟩, T x T; empty if not asked for
    base: float  # ‖θ_0‖²; 0 if products were not asked for


def measure(
    models: Sequence[ModelReference],
    load: Callable[[ModelReference, WeightInfo, Device], Tensor | None],
    device: Device,
    products: bool,
    weight: WeightInfo,
) -> Measured | str | None:
    """Measure one tensor of models, the base first, in any process.

    ``load`` returns a tensor of a model as it is stored, or None if the model has none.

    Returns:
        None if the base lacks it or it is not floating-point; the reason if vocabularies differ.
    """
    origin, *others = models
    base = load(origin, weight, device)
    if base is None and not weight.optional:
        raise ValueError(
            f"The base {origin} lacks tensor {weight.name}, which its architecture requires; "
            "download the checkpoint again."
        )
    if base is None or not base.is_floating_point():
        return None
    experts = []
    for model in others:
        expert = load(model, weight, device)
        if expert is None:
            raise ValueError(
                f"Expert {model} lacks tensor {weight.name}, which the base {origin} holds; "
                "complete the checkpoint or leave the expert out of the merge."
            )
        if weight.vocabulary_axis is not None:
            difference = different_rows(weight.name, (origin, base), (model, expert))
            if difference:
                return difference
        if expert.shape != base.shape:
            raise ValueError(
                f"Tensor {weight.name} has shape {list(expert.shape)} in expert {model} but "
                f"{list(base.shape)} in the base {origin}; merge fine-tunes of one base."
            )
        experts.append(expert)
    inputs = TensorInputs(weight.name, origin, base, tuple(others), tuple(experts))
    norms, dtype, size = inputs.squared_norms, inputs.dtype, base.numel()
    if not products:
        return Measured(norms, dtype, size, [], 0.0)
    return Measured(norms, dtype, size, inner_products(base, experts), squared_norm(base))
