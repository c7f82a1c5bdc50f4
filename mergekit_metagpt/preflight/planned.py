"""What MergeKit will merge, tensor by tensor: its own plan, made from headers alone."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from mergekit.architecture import ModelArchitecture
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer

from mergekit_metagpt.planner import Planner
from mergekit_metagpt.preflight.headers import Header, number_of_layer
from mergekit_metagpt.preflight.models import Checkpoint
from mergekit_metagpt.preflight.wording import PreflightError, instead, reason

LOG = logging.getLogger(__name__)


class PlannerError(PreflightError):
    """MergeKit itself refuses to plan."""


@dataclass(frozen=True)
class Planned:
    """One output tensor.

    Attributes:
        save: the task that writes it.
        task: the task that merges it.
        loads: the task that reads each model's input.
        stored: the header of each input that is there, also of one that is made from others.
        absent: the models that have no such tensor.
    """

    save: SaveTensor
    task: ExecuteMergeMethodTask
    loads: Mapping[ModelReference, LoadTensor]
    stored: Mapping[ModelReference, Header]
    absent: tuple[ModelReference, ...]

    @property
    def name(self) -> str:
        """The name in the output."""
        return str(self.save.tensor_name)

    @property
    def vocabulary_is_aligned(self) -> bool:
        """Whether MergeKit gives all models the same rows before it merges."""
        return not isinstance(self.task.gather_tensors, GatherTensors)

    @property
    def merged_dtype(self) -> torch.dtype:
        """The dtype that the inputs are brought to."""
        dtypes = [
            dtype_from_name(self.loads[model].dtype) or header.torch_dtype or torch.float32
            for model, header in self.stored.items()
        ]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype in the output."""
        return dtype_from_name(self.save.dtype) or self.merged_dtype


@dataclass(frozen=True)
class MergePlan:
    """All output tensors, in the order in which they will be written.

    Attributes:
        architecture: what MergeKit knows of the models' tensors.
        tokenizer: the task that builds the output's tokenizer, if the config asks for one.
    """

    tensors: tuple[Planned, ...]
    architecture: ModelArchitecture
    tokenizer: BuildTokenizer | None

    @property
    def is_inferred(self) -> bool:
        """Whether MergeKit does not know the architecture and has guessed its tensors."""
        return not self.architecture.architectures


def plan_merge(
    config: MergeConfiguration,
    options: MergeOptions,
    checkpoints: Mapping[ModelReference, Checkpoint],
    file: str,
) -> MergePlan:
    """Plan as MergeKit's ``run_merge`` does; nothing is executed.

    Raises:
        PlannerError: if MergeKit refuses.
    """
    checkpoints = {model: checkpoints[model] for model in config.referenced_models()}
    for checkpoint in checkpoints.values():
        if not (checkpoint.description or checkpoint.weights.directory):
            raise PlannerError(
                f"MergeKit does not describe {checkpoint.architecture}, and has to open "
                f"{checkpoint.model} to guess how it is built; run hf download "
                f"{checkpoint.model.model.path} first."
            )
    with _loaders_of(checkpoints):
        try:
            planner = Planner(config, options)
            architecture = planner.arch_info
            _require_modules(config, architecture, file)
            tasks = planner.tasks()
            schedule = [handle.task() for handle in Executor(tasks).schedule.tasks]
        except PreflightError:
            raise
        except Exception as error:  # MergeKit raises whatever its many parts raise
            LOG.info("MergeKit's planner failed", exc_info=True)
            raise PlannerError(_refusal(error, checkpoints, file)) from error
        saves = [task for task in schedule if isinstance(task, SaveTensor)]
        tensors = tuple(_planned(save, checkpoints) for save in saves)
    tokenizer = next((task for task in tasks if isinstance(task, BuildTokenizer)), None)
    return MergePlan(tensors, architecture, tokenizer)


def _refusal(error: Exception, checkpoints: Mapping[ModelReference, Checkpoint], file: str) -> str:
    guessed = sorted(c.architecture for c in checkpoints.values() if not c.description)
    if guessed:
        return (
            f"MergeKit does not describe {guessed[0]}, and fails to guess how these models are "
            f"built ({reason(error)}); merge their weight files with mergekit-pytorch."
        )
    return f"MergeKit cannot plan the merge of {file} ({reason(error)}); correct that."


@contextmanager
def _loaders_of(checkpoints: Mapping[ModelReference, Checkpoint]) -> Iterator[None]:
    """Let MergeKit find these headers where it would open the models and apply adapters."""
    cache = LoaderCache()
    opened = dict(cache.loaders)
    cache.loaders.update(
        {model: LazyTensorLoader(c.weights.index) for model, c in checkpoints.items()}
    )
    try:
        yield
    finally:
        cache.loaders.clear()
        cache.loaders.update(opened)


def _require_modules(
    config: MergeConfiguration, architecture: ModelArchitecture, file: str
) -> None:
    known = list(architecture.modules)
    for name in config.modules or {}:
        if name not in known:
            raise PreflightError(
                f"{file} names the module {name}, which these models do not have; "
                f"{instead(name, known)}."
            )


def _planned(save: SaveTensor, checkpoints: Mapping[ModelReference, Checkpoint]) -> Planned:
    task: Any = save.tensor_task
    gather = task.gather_tensors
    if not isinstance(gather, GatherTensors):
        gather = gather.gather_tensors
    loads = {load.model: load for load in gather.arguments().values()}
    stored, absent = {}, []
    for model, load in loads.items():
        checkpoint = checkpoints[model]
        name = load.group_label()
        held = checkpoint.weights.tensors
        header = held[name] if name is not None else _converted(checkpoint, load)
        if header is None:
            absent.append(model)
        else:
            stored[model] = header
    return Planned(save, task, loads, stored, tuple(absent))


def _converted(checkpoint: Checkpoint, load: LoadTensor) -> Header | None:
    """Return what MergeKit makes from other tensors, such as those of all experts of a layer."""
    model_type = getattr(checkpoint.config, "model_type", None)
    for name in (load.tensor, *(load.aliases or ())):
        # Those of one layer only: MergeKit tries each rule on each of them.
        sources = {
            source: partial(torch.empty, header.shape, dtype=header.torch_dtype, device="meta")
            for source, header in checkpoint.weights.by_layer.get(number_of_layer(name), {}).items()
        }
        tensor = convert_checkpoint_tensors(model_type, sources, name)
        if tensor is not None:
            return Header.of(tensor)
    return None


def different_architectures(
    base: ModelReference | None, checkpoints: list[Checkpoint]
) -> Iterator[str]:
    """Find models that MergeKit does not merge with the base, or with the first."""
    known = [checkpoint for checkpoint in checkpoints if checkpoint.config]
    known.sort(key=lambda c: (c.model != base, str(c.model)))
    for checkpoint in known[1:]:
        first = known[0]
        if checkpoint.description and first.description:
            differ = checkpoint.description != first.description
        else:
            differ = checkpoint.architecture != first.architecture
        if differ:
            yield (
                f"Model {checkpoint.model} is a {checkpoint.architecture}, but {first.model} is a "
                f"{first.architecture}; merge fine-tunes of one base, or pass --allow-crimes."
            )
