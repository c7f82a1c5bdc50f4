"""From a MergeKit config to the coefficients that its merge will use, tensor by tensor.

MergeKit reads the config: its planner applies filters, gradients, slices and modules. This
module then computes the coefficients of the plan with the same functions as the merge.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.options import MergeOptions

from mergekit_metagpt.core.coefficients import Scope, kept_of
from mergekit_metagpt.core.granularities import moved
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.provider import PROVIDER
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.method.merge_method import MetaGPTMerge, by_directions
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import base_and_experts, parameter_sets
from mergekit_metagpt.planning.planner import Planner, TensorMerge
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, in_this_process


@dataclass(frozen=True)
class Forecast:
    """The coefficients of a whole merge."""

    config: MergeConfiguration  # as it was given
    method: MetaGPTMerge  # that it names
    base: ModelReference  # θ_0
    experts: tuple[ModelReference, ...]  # all T experts, in canonical order
    survey: Survey  # of the whole models, with inner products
    merges: list[TensorMerge]  # of each tensor of the output, in the order of the architecture
    entries: dict[str, Entry]  # by tensor, in the same order; buffers have none

    @cached_property
    def summary(self) -> Summary:
        """The coefficients, summarized."""
        kept = None if self.in_place is None else kept_of(self.in_place)
        return Summary(self.entries.values(), kept)

    @cached_property
    def in_place(self) -> list[Scope] | None:
        """Inner products and coefficients of each surveyed tensor, if the merge adds those up.

        None with a sparsified method, by directions, or if slices move layers.
        """
        scales = {m.name: m.parameters["lambda"] for m in self.merges if m.stays}
        grams = {name: it.products for name, it in self.survey.tensors.items()}
        known = scales.keys() & self.entries.keys()
        by_directions = any(entry.directions for entry in self.entries.values())
        if by_directions or not self.method.is_plain or grams.keys() - known:
            return None
        return [
            (gram, [scales[name] * c for c in self.entries[name].row(self.experts)])
            for name, gram in grams.items()
        ]

    def changed(
        self, exponent: float | None = None, priors: Mapping[ModelReference, float] | None = None
    ) -> "Forecast":
        """Return the forecast for another k, or priors w_t of some experts; it measures nothing.

        Not for coefficients of directions, which would change too.
        """
        entries = {name: it.changed(exponent, priors or {}) for name, it in self.entries.items()}
        return replace(self, entries=entries)


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

    ``granularity`` takes the place of the config's, which is not changed. With ``numbers_only``,
    granularity direction is refused before anything is measured.

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
    if numbers_only and any(merge.granularity.by_direction for merge in merges):
        raise BadInputError(
            "A stock config has one weight per expert and tensor, so it cannot express "
            "granularity: direction; merge with mergekit-metagpt merge, or choose granularity: "
            "tensor."
        )
    if moving := next((merge.name for merge in merges if merge.moves_layers), None):
        raise moved(moving)
    base, _ = base_and_experts(config)
    experts = tuple(
        canonical({model for merge in merges for model in merge.task.model_order} - {base})
    )
    device = options.device or "cpu"

    def survey_of(some: tuple[ModelReference, ...]) -> Survey:
        checkpoints, products = Checkpoints(base, some), some == experts
        return SURVEYS.survey_of(checkpoints, device, progress, mapper, products)

    survey = survey_of(experts)
    entries: dict[str, Entry] = {}
    to_load: dict[Task[Any], list[TensorMerge]] = {}
    for merge in merges:
        if _is_as_surveyed(merge, survey, base):
            known = survey.tensors[merge.name]
            norms = survey.over_scope(merge.name, merge.parameters["granularity"]) or known.norms
            parameters = merge.parameters_of(experts)
            entries[merge.name] = Entry.of(merge.name, experts, norms, known.size, parameters)
        else:
            to_load.setdefault(merge.task.gather_tensors, []).append(merge)
    executor = Executor(list(to_load), math_device=torch.device(device))
    quiet = not (progress and any(merge.granularity.by_direction for merge in merges))
    for task, tensors in executor.run(quiet=quiet):
        ids = tuple(canonical(tensors.keys() - {base}))
        if all(tensor.is_floating_point() for tensor in tensors.values()):  # others are copied
            for merge in to_load[task]:
                its = tuple(tensors[expert] for expert in ids)
                loaded = TensorInputs(merge.name, base, tensors[base], ids, its)
                entries[merge.name] = _entry(merge, loaded, survey_of)
    in_order = {merge.name: entries[merge.name] for merge in merges if merge.name in entries}
    return Forecast(config, method, base, experts, survey, merges, in_order)


def own_method(config: MergeConfiguration) -> MetaGPTMerge:
    """Return the method that a config names.

    Raises:
        BadInputError: if it is not this package's.
    """
    methods = merge_methods.registered_methods()
    ours = {method.spec.name: method for method in methods if isinstance(method, MetaGPTMerge)}
    if config.merge_method not in ours:
        raise BadInputError(
            f"merge_method {config.merge_method} has no coefficients to choose; set one of "
            f"{', '.join(ours)}."
        )
    return ours[config.merge_method]


def _is_as_surveyed(merge: TensorMerge, survey: Survey, base: ModelReference) -> bool:
    """Whether a merge has the norms of the survey, bit for bit.

    Coefficients of directions follow from the tensors, so those are always loaded.
    """
    measured = survey.tensors.get(merge.name)
    is_whole = set(merge.task.model_order) - {base} == set(survey.experts)
    if not (measured and merge.stays and is_whole) or merge.vocabulary_is_aligned:
        return False
    stored = measured.dtype
    dtypes = {dtype_from_name(load.dtype) or stored for load in merge.loads.values()}
    return not merge.granularity.by_direction and all(
        torch.promote_types(stored, dtype) == dtype
        and working_dtype(stored) == working_dtype(dtype)
        for dtype in dtypes
    )


def _entry(
    merge: TensorMerge,
    loaded: TensorInputs,
    survey_of: Callable[[tuple[ModelReference, ...]], Survey],
) -> Entry:
    """Choose the coefficients of one tensor as the merge will."""
    experts: tuple[Any, ...] = loaded.ids
    parameters, found = merge.parameters_of(experts), None
    if merge.granularity.by_direction:
        with torch.autocast(loaded.base.device.type, enabled=False):  # as MergeKit merges
            found = by_directions(loaded, PROVIDER.models_of([loaded]), parameters)
        norms = found.squared_norms
    elif merge.granularity.needs_survey:
        norms = survey_of(experts).norms_of(loaded, parameters["granularity"])
    else:
        norms = loaded.squared_norms
    return Entry.of(merge.name, experts, norms, loaded.base.numel(), parameters, found)
