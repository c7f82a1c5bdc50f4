"""From a MergeKit config to the coefficients that its merge will use, tensor by tensor.

MergeKit reads the config: its planner applies filters, gradients, slices and modules, and
this module asks the same functions as the merge for the coefficients of what was planned.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.coefficients import scaling_coefficients
from mergekit_metagpt.distributed import Mapper, in_this_process
from mergekit_metagpt.methods import MetaGPTMerge
from mergekit_metagpt.planner import Measurements, Place, Planner, Step
from mergekit_metagpt.survey import Norms, Survey, canonical, layer_of, scoped_norms


@dataclass(frozen=True)
class PlannedTensor:
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
class Plan:
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
    tensors: list[PlannedTensor]
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
        return [math.fsum(values) / len(values) if values else 0.0 for values in found.values()]

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

    def row(self, tensor: PlannedTensor) -> Norms:
        """Return a tensor's coefficients for all T experts; 0 for one that does not hold it."""
        known = dict(zip(tensor.experts, tensor.coefficients, strict=True))
        return tuple(known.get(expert, 0.0) for expert in self.experts)


def plan_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    granularity: str | None = None,
    progress: bool = True,
    mapper: Mapper = in_this_process,
) -> Plan:
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
    steps = Planner(config, options).steps()
    bases = {step.task.base_model for step in steps}
    if len(bases) != 1:
        raise ValueError(
            "The slices of this merge have different base models; plan them one by one."
        )
    (base,) = bases
    if base is None:
        raise ValueError("The merge config names no base_model; add the model that was fine-tuned.")
    experts = tuple(canonical({m for s in steps for m in s.task.model_order} - {base}))
    measurements = Measurements(base, experts, config, options, progress, mapper)
    measurements.take(steps)
    tensors = [t for step in steps if (t := _planned(step, measurements)) is not None]
    shared = dict(steps[0].task.parameters.items())
    return Plan(
        config=config,
        method=method,
        base=base,
        experts=experts,
        survey=measurements.survey,
        tensors=tensors,
        buffers=[step.name for step in steps if step.name not in measurements.own],
        granularity=shared["granularity"],
        exponent=shared["exponent"],
    )


def parameter_sets(config: MergeConfiguration) -> Iterator[dict[str, Any]]:
    """Yield every ``parameters`` mapping of a config, from its inside out."""
    slices = list(config.slices or [])
    models = list(config.models or [])
    for module in (config.modules or {}).values():
        slices += module.slices or []
        models += module.models or []
    holders: list[Any] = [*models, *(source for part in slices for source in part.sources), *slices]
    for holder in [*holders, *(config.modules or {}).values(), config]:
        if holder.parameters is not None:
            yield holder.parameters


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


def _planned(step: Step, measurements: Measurements) -> PlannedTensor | None:
    if step.name not in measurements.own:
        return None
    experts, own = measurements.own[step.name]
    shared = dict(step.task.parameters.items())
    priors = tuple(step.task.input_parameters[expert]["weight"] for expert in experts)
    norms = scoped_norms(
        step.name, shared["granularity"], lambda: own, lambda: measurements.survey_of(experts)
    )
    return PlannedTensor(
        name=step.name,
        inputs={model: w.name for model, w in step.gather.weight_info.items()},
        place=step.place,
        experts=experts,
        priors=priors,
        squared_norms=norms,
        coefficients=tuple(scaling_coefficients(norms, priors, shared["exponent"])),
    )
