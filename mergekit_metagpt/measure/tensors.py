"""One tensor of a base and its experts: loaded, compared and measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import inner_products, squared_norm
from mergekit_metagpt.measure.vocabularies import DifferentVocabularyError, compare_vocabularies

Device = torch.device | str


@dataclass(frozen=True)
class Measured:
    """Results for one tensor.

    Attributes:
        norms: ‖τ_t‖², T floats.
        dtype: the stored dtype.
        size: the number of elements.
        products: ⟨τ_i, τ_j⟩, T x T; empty if not asked for.
        base: ‖θ_0‖²; 0 if inner products were not asked for.
    """

    norms: Norms
    dtype: torch.dtype
    size: int
    products: list[list[float]]
    base: float


@dataclass(frozen=True)
class TensorMeasurer:
    """Measures the task vectors of one tensor after another, in any process.

    Attributes:
        base: θ_0.
        experts: θ_t, in canonical order.
        load: returns a tensor of a model as it is stored, or None if the model has none.
        device: the device of the arithmetic.
        products: whether inner products are measured too.
    """

    base: ModelReference
    experts: tuple[ModelReference, ...]
    load: Callable[[ModelReference, WeightInfo, Device], Tensor | None]
    device: Device
    products: bool

    def __call__(self, weight: WeightInfo) -> Measured | DifferentVocabularyError | None:
        """Measure one tensor; return a vocabulary error instead of raising it."""
        try:
            return self._measure(weight)
        except DifferentVocabularyError as difference:
            return difference

    def _measure(self, weight: WeightInfo) -> Measured | None:
        """Measure one tensor; return None if the base lacks it or it is not floating-point."""
        base = self.load(self.base, weight, self.device)
        if base is None and not weight.optional:
            raise ValueError(
                f"The base {self.base} lacks tensor {weight.name}, which its architecture "
                "requires; download the checkpoint again."
            )
        if base is None or not base.is_floating_point():
            return None
        stored = [self._load_expert(model, weight, base) for model in self.experts]
        inputs = TensorInputs(weight.name, self.base, base, self.experts, tuple(stored))
        norms, dtype, size = inputs.squared_norms, inputs.dtype, base.numel()
        if not self.products:
            return Measured(norms, dtype, size, [], 0.0)
        return Measured(norms, dtype, size, inner_products(base, stored), squared_norm(base))

    def _load_expert(self, model: ModelReference, weight: WeightInfo, base: Tensor) -> Tensor:
        expert = self.load(model, weight, self.device)
        if expert is None:
            raise ValueError(
                f"Expert {model} lacks tensor {weight.name}, which the base {self.base} "
                "holds; complete the checkpoint or leave the expert out of the merge."
            )
        if weight.vocabulary_axis is not None:
            compare_vocabularies(weight, (self.base, base), (model, expert))
        if expert.shape != base.shape:
            raise ValueError(
                f"Tensor {weight.name} has shape {list(expert.shape)} in expert {model} but "
                f"{list(base.shape)} in the base {self.base}; merge fine-tunes of one base."
            )
        return expert
