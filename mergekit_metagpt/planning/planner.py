"""MergeKit's own plan of a merge: which tensors it writes, and from which it makes them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_metagpt.core.granularities import GRANULARITIES, Granularity
from mergekit_metagpt.measure.headers import Header
from mergekit_metagpt.mergekit_private import model_out_config
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.config import parts


@dataclass(frozen=True)
class TensorMerge:
    """The task that writes one tensor of the output, and the place of the config it is from.

    ``stored`` and ``read`` are empty until ``plan_outputs`` has read the headers. An input that
    MergeKit makes from other tensors is read under several names.
    """

    name: str  # in the output
    save: SaveTensor
    task: ExecuteMergeMethodTask  # merges it
    place: tuple[str, int]  # the module, and the number of the slice in it
    stored: Mapping[ModelReference, Header] = field(default_factory=dict)  # that exist or are made
    read: Mapping[ModelReference, tuple[str, ...]] = field(default_factory=dict)  # stored names

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The parameters that all models share, by name."""
        return dict(self.task.parameters.items())

    @cached_property
    def model_parameters(self) -> dict[ModelReference, dict[str, Any]]:
        """The parameters of each model, by name."""
        return {model: dict(values.items()) for model, values in self.task.input_parameters.items()}

    def parameters_of(self, experts: Iterable[Any]) -> dict[str, Any]:
        """Return the parameters that all models share, and the priors of experts as weight."""
        priors = {expert: self.model_parameters[expert]["weight"] for expert in experts}
        return {**self.parameters, "weight": priors}

    @property
    def granularity(self) -> Granularity:
        """Which tensors share its coefficients; a stock method chooses none by whole models."""
        return GRANULARITIES[self.parameters.get("granularity", "tensor")]

    @property
    def moves_layers(self) -> bool:
        """Whether slices put tensors of another layer here, although it has to keep its place."""
        return self.granularity.keeps_layers and not self.stays and bool(layer_of(self.name))

    @property
    def vocabulary_axis(self) -> int | None:
        """The axis of the tensor that has a row for each token."""
        return self.task.output_weight.vocabulary_axis

    @property
    def vocabulary_is_aligned(self) -> bool:
        """Whether MergeKit gives all models the same rows before it merges."""
        return not isinstance(self.task.gather_tensors, GatherTensors)

    @property
    def stays(self) -> bool:
        """Whether every model contributes its own tensor of this name."""
        return {load.tensor for load in self.loads.values()} == {self.name}

    @cached_property
    def loads(self) -> dict[ModelReference, LoadTensor]:
        """The task that reads each model's tensor."""
        gather: Any = self.task.gather_tensors
        if self.vocabulary_is_aligned:
            gather = gather.gather_tensors
        return {load.model: load for load in gather.arguments().values()}

    @property
    def merged_dtype(self) -> torch.dtype:
        """The dtype that the inputs are converted to."""
        dtypes = [
            dtype_from_name(self.loads[model].dtype) or header.torch_dtype or torch.float32
            for model, header in self.stored.items()
        ]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    def written_parameters(self, rows: int | None) -> int:
        """Return how many numbers it holds; ``rows`` is the vocabulary, if that changes."""
        shapes = [header.shape for header in self.stored.values()] or [()]
        axis = self.vocabulary_axis
        if axis is None or not self.vocabulary_is_aligned:
            return math.prod(shapes[0])
        shared = rows or min(shape[axis] for shape in shapes)
        return math.prod((*shapes[0][:axis], shared, *shapes[0][axis + 1 :]))

    def written_bytes(self, rows: int | None) -> int:
        """Return its size; ``rows`` is the vocabulary, if that changes."""
        dtype = dtype_from_name(self.save.dtype) or self.merged_dtype
        return self.written_parameters(rows) * dtype.itemsize


class Planner(MergePlanner):
    """MergeKit's planner as its ``run_merge`` makes it, which also remembers the slices.

    Nothing is executed or written. The config stays as it is, which MergeKit's planner changes.
    """

    def __init__(self, config: MergeConfiguration, options: MergeOptions) -> None:
        LoaderCache().setup(options)
        architecture = get_architecture_info(config, options)
        super().__init__(
            config.model_copy(deep=True),
            architecture,
            options,
            model_out_config(config, architecture, options.trust_remote_code),
        )
        self._slices: dict[str, Any] = {}

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        """Plan one tensor as MergeKit does, and remember where in the config it came from."""
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        self._slices[weight.name] = cfg_reader.slice_out

    @cached_property
    def tasks(self) -> list[Task[Any]]:
        """The tasks of a merge to disk."""
        # With pydantic 2.14 MergeKit's plan_in_memory raises.
        return list(self.plan_to_disk(""))

    def tensor_merges(self) -> list[TensorMerge]:
        """Return what makes each tensor of the output, in the order of the architecture."""
        saves: list[Any] = [task for task in self.tasks if isinstance(task, SaveTensor)]
        # By now the planner has brought the config into the form of modules with slices.
        places = {id(it.holder): (it.module, it.number or 0) for it in parts(self.config)}
        slices = [id(self._slices[save.tensor_name]) for save in saves]
        return [
            TensorMerge(it.tensor_name, it, it.tensor_task, places[slice_])
            for it, slice_ in zip(saves, slices, strict=True)
        ]

    def in_order_of_writing(self) -> list[TensorMerge]:
        """Return the same in the order in which MergeKit's executor will write them."""
        merges = {merge.name: merge for merge in self.tensor_merges()}
        schedule = [handle.task() for handle in Executor(self.tasks).schedule.tasks]
        return [merges[task.tensor_name] for task in schedule if isinstance(task, SaveTensor)]
