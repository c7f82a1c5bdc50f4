"""The squared norms that the coefficients of a planned merge come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.directions import Directions
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.provider import PROVIDER
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.method.merge_method import by_directions
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.planner import TensorMerge
from mergekit_metagpt.workers import Mapper, in_this_process


@dataclass(frozen=True)
class Measured:
    """The task vectors of one tensor of the output.

    Attributes:
        name: its name.
        experts: those that contribute to it, T of them, in canonical order.
        squared_norms: ‖τ_t‖², T floats.
        size: how many elements it has.
        dtype: the dtype that it is merged in.
        directions: what the tensor comes to if every direction has a coefficient.
    """

    name: str
    experts: tuple[ModelReference, ...]
    squared_norms: Norms
    size: int
    dtype: torch.dtype
    directions: Directions | None = None


@dataclass
class Measurements:
    """The squared norms of the tensors of a merge, and of the whole models."""

    base: ModelReference
    experts: tuple[ModelReference, ...]
    config: MergeConfiguration
    options: MergeOptions
    progress: bool
    mapper: Mapper = in_this_process
    tensors: dict[str, Measured] = field(default_factory=dict)
    surveys: dict[tuple[ModelReference, ...], Survey] = field(default_factory=dict)

    @cached_property
    def survey(self) -> Survey:
        """The survey of all experts, with inner products."""
        return self._take_survey(self.experts, products=True)

    def survey_of(self, experts: tuple[ModelReference, ...]) -> Survey:
        """The survey of those experts that one slice merges."""
        if experts == self.experts:
            return self.survey
        if experts not in self.surveys:
            self.surveys[experts] = self._take_survey(experts, products=False)
        return self.surveys[experts]

    def _take_survey(self, experts: Sequence[ModelReference], products: bool) -> Survey:
        return SURVEYS.survey_of(
            Checkpoints(self.base, tuple(experts)),
            self.options.device or "cpu",
            self.progress,
            self.mapper,
            products,
        )

    def take(self, merges: Sequence[TensorMerge]) -> None:
        """Take each tensor's norms from the survey, or else measure it as MergeKit loads it.

        Coefficients of directions follow from the tensors, so those are always loaded.
        """
        others: dict[Task[Any], list[TensorMerge]] = {}
        for merge in merges:
            experts = tuple(canonical(set(merge.models) - {self.base}))
            stored = self.survey.dtypes.get(merge.name)
            if (
                stored is not None
                and merge.reads_checkpoints_as_they_are
                and experts == self.experts
                and _calculates_alike(merge, stored)
                and not merge.by_direction
            ):
                norms, size = self.survey.squared_norms[merge.name], self.survey.sizes[merge.name]
                self.tensors[merge.name] = Measured(merge.name, experts, norms, size, stored)
            else:
                others.setdefault(merge.task.gather_tensors, []).append(merge)
        executor = Executor(list(others), math_device=torch.device(self.options.device or "cpu"))
        quiet = not (self.progress and any(merge.by_direction for merge in merges))
        for task, tensors in executor.run(quiet=quiet):
            for merge in others[task]:
                self._measure(merge, tensors)

    def _measure(self, merge: TensorMerge, tensors: dict[ModelReference, Any]) -> None:
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            return  # a buffer, which is copied
        ids = [model for model in merge.models if model in tensors]
        group = TensorGroup.from_tensors(
            [tensors[model] for model in ids],
            ids=ids,
            base_index=ids.index(self.base),
            name=merge.name,
        )
        inputs = TensorInputs.of(group)
        experts: Any = inputs.ids
        directions = None
        if merge.by_direction:
            shape_of = PROVIDER.models_of([inputs]).shape_of
            directions = by_directions(inputs, shape_of, merge.method_parameters(experts))
        norms = directions.squared_norms if directions else inputs.squared_norms
        self.tensors[merge.name] = Measured(
            merge.name,
            experts,
            norms,
            inputs.base.numel(),
            inputs.dtype,
            directions=directions,
        )


def _calculates_alike(merge: TensorMerge, stored: torch.dtype) -> bool:
    """Whether tensors have the same norms, bit for bit, as MergeKit loads them and as stored."""
    dtypes = {dtype_from_name(load.dtype) or stored for load in merge.loads.values()}
    return all(
        torch.promote_types(stored, dtype) == dtype
        and working_dtype(stored) == working_dtype(dtype)
        for dtype in dtypes
    )
