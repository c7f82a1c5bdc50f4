"""From a MergeKit config to the coefficients that its merge will use, tensor by tensor.

MergeKit reads the config: its planner applies filters, gradients, slices and modules. This
module then computes the coefficients of the plan with the same functions as the merge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.core.coefficients import kept_of_parts
from mergekit_metagpt.core.granularities import GRANULARITIES, moved
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import Place, parameter_sets
from mergekit_metagpt.planning.measurements import Measurements
from mergekit_metagpt.planning.planner import Planner, TensorMerge
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, in_this_process


@dataclass(frozen=True)
class TensorForecast:
    """One output tensor and how it will be merged.

    Attributes:
        entry: its coefficients, and what they come from.
        inputs: the name of the tensor that each model contributes.
        place: the part of the config that it came from.
        scale: ``lambda``, which multiplies all coefficients.
    """

    entry: Entry
    inputs: dict[ModelReference, str]
    place: Place
    scale: float

    @property
    def name(self) -> str:
        """Its name in the output."""
        return self.entry.tensor or ""


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
    """

    config: MergeConfiguration
    method: MetaGPTMerge
    base: ModelReference
    experts: tuple[ModelReference, ...]
    survey: Survey
    tensors: list[TensorForecast]
    buffers: list[str]

    @cached_property
    def summary(self) -> Summary:
        """The coefficients, summarized."""
        entries = [tensor.entry for tensor in self.tensors]
        return Summary(entries, None if self.in_place is None else kept_of_parts(self.in_place))

    @cached_property
    def in_place(self) -> list[tuple[Sequence[Sequence[float]], list[float]]] | None:
        """Inner products and coefficients of each surveyed tensor, if the merge adds those up.

        Otherwise, with a sparsified method, or by directions, or if slices move
        layers, None.
        """
        merged = {t.name: t for t in self.tensors if set(t.inputs.values()) == {t.name}}
        grams = self.survey.grams or {}
        by_direction = any(tensor.entry.directions for tensor in self.tensors)
        if by_direction or not self.method.is_plain or grams.keys() - merged.keys():
            return None
        return [
            (gram, [merged[name].scale * c for c in merged[name].entry.row(self.experts)])
            for name, gram in grams.items()
        ]

    def changed(
        self, exponent: float | None = None, priors: Mapping[ModelReference, float] | None = None
    ) -> "Forecast":
        """Return the forecast for another exponent, or other priors; nothing is measured again.

        Args:
            exponent: k in λ_t ∝ w_t ‖τ_t‖^k; if None, as it is.
            priors: w_t for some experts, in every tensor.

        Raises:
            ValueError: if directions have coefficients, which would change too.
        """
        if exponent is None and priors is None:
            return self
        if any(tensor.entry.directions for tensor in self.tensors):
            raise ValueError("Directions have to be measured again.")
        changed = [replace(t, entry=t.entry.changed(exponent, priors or {})) for t in self.tensors]
        return replace(self, tensors=changed)


def forecast(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    granularity: str | None = None,
    numbers_only: bool = False,
    progress: bool = True,
    mapper: Mapper = in_this_process,
) -> Forecast:
    """Measure what a merge will measure, and return the coefficients it will use.

    Args:
        config: any config whose method is one of this package's; it is not changed.
        options: MergeKit's options.
        granularity: used in place of the config's.
        numbers_only: refuse granularity direction, before anything is measured.
        progress: whether a progress bar is shown.
        mapper: where the models are measured: in this process, or on a cluster.

    Raises:
        ValueError: if the method is not this package's, or the merge would refuse its inputs.
    """
    method = own_method(config)
    config = config.model_copy(deep=True)
    if granularity is not None:
        for parameters in parameter_sets(config):
            parameters.pop("granularity", None)
        config.parameters = {**(config.parameters or {}), "granularity": granularity}
    merges = Planner(config, options).tensor_merges()
    if numbers_only and any(merge.by_direction for merge in merges):
        raise BadInputError(
            "A stock config has one weight per expert and tensor, so it cannot express "
            "granularity: direction; merge with mergekit-metagpt merge, or choose granularity: "
            "tensor."
        )
    base = _only_base(merges)
    experts = tuple(canonical({model for merge in merges for model in merge.models} - {base}))
    measurements = Measurements(base, experts, config, options, progress, mapper)
    measurements.take(merges)
    return Forecast(
        config=config,
        method=method,
        base=base,
        experts=experts,
        survey=measurements.survey,
        tensors=[_foretell(m, measurements) for m in merges if m.name in measurements.tensors],
        buffers=[merge.name for merge in merges if merge.name not in measurements.tensors],
    )


def own_method(config: MergeConfiguration) -> MetaGPTMerge:
    """Return the method that a config names.

    Raises:
        BadInputError: if it is not this package's.
    """
    methods = {m.spec.name: m for m in merge_methods.registered_methods()}
    method = methods.get(config.merge_method)
    if not isinstance(method, MetaGPTMerge):
        ours = [name for name, m in methods.items() if isinstance(m, MetaGPTMerge)]
        raise BadInputError(
            f"merge_method {config.merge_method} has no coefficients to choose; set one of "
            f"{', '.join(ours)}."
        )
    return method


def _only_base(merges: list[TensorMerge]) -> ModelReference:
    bases = {merge.base for merge in merges}
    if len(bases) != 1:
        raise BadInputError(
            "The slices of this merge have different base models; plan them one by one."
        )
    (base,) = bases
    if base is None:
        raise ValueError("The merge config names no base_model; add the model that was fine-tuned.")
    return base


def _foretell(merge: TensorMerge, measurements: Measurements) -> TensorForecast:
    """Choose the coefficients of one tensor as the merge will."""
    measured = measurements.tensors[merge.name]
    experts = measured.experts
    parameters = merge.method_parameters(experts)
    if merge.moves_layers:
        raise moved(merge.name)
    norms = measured.squared_norms
    if GRANULARITIES[parameters["granularity"]].needs_survey:
        norms = measurements.survey_of(experts).norms_of(measured, parameters["granularity"])
    return TensorForecast(
        entry=Entry.of(merge.name, experts, norms, measured.size, parameters, measured.directions),
        inputs=merge.inputs,
        place=merge.place,
        scale=parameters["lambda"],
    )
