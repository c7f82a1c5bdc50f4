"""From a MergeKit config to the coefficients that its merge will use, tensor by tensor.

MergeKit reads the config: its planner applies filters, gradients, slices and modules, and
this module asks the same functions as the merge for the coefficients of what was planned.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.coefficients import Norms, scaling_coefficients
from mergekit_metagpt.granularities import GRANULARITIES
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.names import canonical, layer_of
from mergekit_metagpt.planning.config import Place, parameter_sets
from mergekit_metagpt.planning.measurements import Measurements
from mergekit_metagpt.planning.planner import Planner, TensorMerge
from mergekit_metagpt.workers import Mapper, in_this_process


@dataclass(frozen=True)
class TensorForecast:
    """One output tensor and how it will be merged.

    Attributes:
        name: its name in the output.
        inputs: the name of the tensor that each model contributes.
        place: the part of the config that it came from.
        experts: the experts that contribute, in canonical order.
        priors: w_t, in that order.
        squared_norms: ‖τ_t‖² over the scope of the coefficients.
        coefficients: λ_t.
    """

    name: str
    inputs: dict[ModelReference, str]
    place: Place
    experts: tuple[ModelReference, ...]
    priors: Norms
    squared_norms: Norms
    coefficients: Norms


@dataclass(frozen=True)
class Forecast:
    """The coefficients of a whole merge.

    Attributes:
        config: the config, as it was given.
        method: the method that it names.
        base: θ_0.
        experts: all T experts, in canonical order.
        survey: the whole models, with inner products.
        tensors: what will be merged, in the order of the architecture.
        buffers: tensors that are copied, since they hold no floating-point numbers.
        granularity: the scope of the coefficients.
        exponent: k in λ_t ∝ w_t ‖τ_t‖^k.
    """

    config: MergeConfiguration
    method: MetaGPTMerge
    base: ModelReference
    experts: tuple[ModelReference, ...]
    survey: Survey
    tensors: list[TensorForecast]
    buffers: list[str]
    granularity: str
    exponent: float

    @cached_property
    def coefficients(self) -> list[float]:
        """T shares for the whole model: Theorem 10, with the config's exponent and priors."""
        return scaling_coefficients(self.survey.model, self.priors, self.exponent)

    @property
    def priors(self) -> list[float]:
        """T priors; where they vary, the mean over the tensors that an expert contributes to."""
        found: dict[ModelReference, list[float]] = {expert: [] for expert in self.experts}
        for tensor in self.tensors:
            for expert, prior in zip(tensor.experts, tensor.priors, strict=True):
                found[expert].append(prior)
        return [_mean(values) for values in found.values()]

    @cached_property
    def groups(self) -> dict[str, Norms]:
        """The coefficients of each layer or tensor; of each tensor where a layer's vary."""
        if self.granularity == "model" and len({t.coefficients for t in self.tensors}) <= 1:
            return {}
        by_layer: dict[str, set[Norms]] = {}
        for tensor in self.tensors:
            by_layer.setdefault(layer_of(tensor.name) or tensor.name, set()).add(self.row(tensor))
        groups = {}
        for tensor in self.tensors:
            layer = layer_of(tensor.name) or tensor.name
            shared = self.granularity != "tensor" and len(by_layer[layer]) == 1
            groups[layer if shared else tensor.name] = self.row(tensor)
        return groups

    def row(self, tensor: TensorForecast) -> Norms:
        """Return a tensor's coefficients for all T experts; 0 for one that does not hold it."""
        known = dict(zip(tensor.experts, tensor.coefficients, strict=True))
        return tuple(known.get(expert, 0.0) for expert in self.experts)


def forecast(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    granularity: str | None = None,
    progress: bool = True,
    mapper: Mapper = in_this_process,
) -> Forecast:
    """Measure what a merge will measure, and return the coefficients it will use.

    Args:
        config: any config whose method is one of this package's; it is not changed.
        options: MergeKit's options.
        granularity: used in place of the config's.
        progress: whether a progress bar is shown.
        mapper: who measures the models.

    Raises:
        ValueError: if the method is another one, or the merge itself would refuse its inputs.
    """
    method = _method(config)
    config = config.model_copy(deep=True)
    if granularity is not None:
        for parameters in parameter_sets(config):
            parameters.pop("granularity", None)
        config.parameters = {**(config.parameters or {}), "granularity": granularity}
    merges = Planner(config, options).tensor_merges()
    base = _only_base(merges)
    experts = tuple(canonical({model for merge in merges for model in merge.models} - {base}))
    measurements = Measurements(base, experts, config, options, progress, mapper)
    measurements.take(merges)
    shared = merges[0].parameters
    return Forecast(
        config=config,
        method=method,
        base=base,
        experts=experts,
        survey=measurements.survey,
        tensors=[_foretell(m, measurements) for m in merges if m.name in measurements.tensors],
        buffers=[merge.name for merge in merges if merge.name not in measurements.tensors],
        granularity=shared["granularity"],
        exponent=shared["exponent"],
    )


def _mean(values: list[float]) -> float:
    """Return the mean of numbers of at least 0, however large; 0 if there are none."""
    largest = max(values, default=0.0)
    return largest * (math.fsum(v / largest for v in values) / len(values)) if largest else 0.0


def _method(config: MergeConfiguration) -> MetaGPTMerge:
    methods = {m.spec.name: m for m in merge_methods.registered_methods()}
    method = methods.get(config.merge_method)
    if not isinstance(method, MetaGPTMerge):
        ours = [name for name, m in methods.items() if isinstance(m, MetaGPTMerge)]
        raise ValueError(
            f"merge_method {config.merge_method} has no coefficients to choose; set one of "
            f"{', '.join(ours)}."
        )
    return method


def _only_base(merges: list[TensorMerge]) -> ModelReference:
    bases = {merge.base for merge in merges}
    if len(bases) != 1:
        raise ValueError(
            "The slices of this merge have different base models; plan them one by one."
        )
    (base,) = bases
    if base is None:
        raise ValueError("The merge config names no base_model; add the model that was fine-tuned.")
    return base


def _foretell(merge: TensorMerge, measurements: Measurements) -> TensorForecast:
    """Choose the coefficients of one tensor as the merge will."""
    measured = measurements.tensors[merge.name]
    parameters, experts = merge.parameters, measured.experts
    priors = tuple(merge.model_parameters[expert]["weight"] for expert in experts)
    norms = GRANULARITIES[parameters["granularity"]].squared_norms(
        measured, lambda: measurements.survey_of(experts)
    )
    return TensorForecast(
        name=merge.name,
        inputs=merge.inputs,
        place=merge.place,
        experts=experts,
        priors=priors,
        squared_norms=norms,
        coefficients=tuple(scaling_coefficients(norms, priors, parameters["exponent"])),
    )
