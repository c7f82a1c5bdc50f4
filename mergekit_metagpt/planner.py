"""What MergeKit plans to merge, and the squared norms of that."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration, OutputSliceDefinition
from mergekit.graph import Executor, Task
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge import _model_out_config
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor

from mergekit_metagpt.checkpoints import Checkpoints
from mergekit_metagpt.distributed import Mapper, in_this_process
from mergekit_metagpt.survey import Norms, Survey, canonical, measure, split

# The module of a config, and the number of the slice in it.
Place = tuple[str, int]


@dataclass(frozen=True)
class Step:
    """A planned task, and the part of the config that it came from."""

    task: ExecuteMergeMethodTask
    place: Place

    @property
    def name(self) -> str:
        """The name of the output tensor."""
        return self.task.output_weight.name

    @property
    def gather(self) -> GatherTensors:
        """The task that loads the inputs, before any change of their vocabulary."""
        task: Any = self.task.gather_tensors
        return task if isinstance(task, GatherTensors) else task.gather_tensors

    @property
    def reads_checkpoints_as_they_are(self) -> bool:
        """Whether every model contributes its own tensor of this name, unchanged."""
        return self.gather is self.task.gather_tensors and all(
            weight.name == self.name for weight in self.gather.weight_info.values()
        )


class Planner(MergePlanner):
    """MergeKit's planner as its ``run_merge`` makes it, which also remembers the slices.

    Nothing is executed or written.

    Args:
        config: what to plan; it is not changed, as MergeKit's own planner would.
        options: MergeKit's options.
    """

    def __init__(self, config: MergeConfiguration, options: MergeOptions) -> None:
        LoaderCache().setup(options)
        architecture = get_architecture_info(config, options)
        super().__init__(
            config.model_copy(deep=True),
            architecture,
            options,
            _model_out_config(config, architecture, options.trust_remote_code),
        )
        self._slices: list[OutputSliceDefinition | None] = []

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        """Plan one tensor as MergeKit does, and remember where in the config it came from."""
        planned = len(self._tensors)
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        self._slices += [cfg_reader.slice_out] * (len(self._tensors) - planned)

    def tasks(self) -> list[Task[Any]]:
        """Return the tasks of a merge to disk."""
        # With pydantic 2.14 MergeKit's plan_in_memory raises.
        return list(self.plan_to_disk(""))

    def steps(self) -> list[Step]:
        """Return the tasks that merge a tensor each."""
        self.tasks()  # fills _tensors and _slices
        places = {
            id(part): (name, number)
            for name, module in (self.config.modules or {}).items()
            for number, part in enumerate(module.slices or [])
        }
        merges: list[Any] = [task for _, task in self._tensors]
        return [
            Step(task, places[id(part)]) for task, part in zip(merges, self._slices, strict=True)
        ]


@dataclass
class Measurements:
    """The squared norms that the coefficients of a merge come from."""

    base: ModelReference
    experts: tuple[ModelReference, ...]
    config: MergeConfiguration
    options: MergeOptions
    progress: bool
    mapper: Mapper = in_this_process
    own: dict[str, tuple[tuple[ModelReference, ...], Norms]] = field(default_factory=dict)
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
        return Checkpoints(self.base, tuple(experts)).survey(
            dtype_from_name(self.config.dtype),
            self.options.device or "cpu",
            self.progress,
            products,
            self.mapper,
        )

    def take(self, steps: Sequence[Step]) -> None:
        """Measure every step: from the survey where it has done so, else as MergeKit loads it."""
        others: dict[Task[Any], list[Step]] = {}
        for step in steps:
            experts = tuple(canonical(set(step.task.model_order) - {self.base}))
            norms = self.survey.squared_norms.get(step.name)
            if norms and step.reads_checkpoints_as_they_are and experts == self.experts:
                self.own[step.name] = (experts, norms)
            else:
                others.setdefault(step.task.gather_tensors, []).append(step)
        executor = Executor(list(others), math_device=torch.device(self.options.device or "cpu"))
        for task, tensors in executor.run(quiet=True):
            for step in others[task]:
                self._measure(step, tensors)

    def _measure(self, step: Step, tensors: dict[ModelReference, Any]) -> None:
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            return  # a buffer, which is copied
        ids = [model for model in step.task.model_order if model in tensors]
        group = TensorGroup.from_tensors(
            [tensors[model] for model in ids],
            ids=ids,
            base_index=ids.index(self.base),
            name=step.name,
        )
        base, experts = split(group)
        pairs: list[tuple[Any, Tensor]] = [(expert.id, expert.tensor) for expert in experts]
        norms = measure(step.name, (base.id, base.tensor), pairs)
        self.own[step.name] = (tuple(model for model, _ in pairs), norms)
