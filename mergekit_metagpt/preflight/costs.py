"""What a merge will cost: bytes, passes, memory and files."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.options import MergeOptions

from mergekit_metagpt.methods import MetaGPTMerge
from mergekit_metagpt.preflight.models import Checkpoint
from mergekit_metagpt.preflight.planned import MergePlan, Planned

# What the kernels hold besides the tensors: three buffers of 2^19 float64 numbers.
_BUFFERS = 3 * 8 << 19


@dataclass(frozen=True)
class Costs:
    """What a merge will cost.

    Attributes:
        method: its name.
        base: the base, if the method has one.
        experts: the other models.
        tensors: how many will be written.
        parameters: how many numbers they hold.
        passes: how often the models are read.
        bytes_read: by all passes, of tensors.
        bytes_written: of tensors.
        bytes_applied: of models that MergeKit writes to the LoRA cache first.
        shards: how many weight files there will be.
        peak_memory: bytes of tensors held at once, roughly; Python itself takes more.
        notes: what else is worth knowing, one sentence each.
    """

    method: str
    base: str | None
    experts: tuple[str, ...]
    tensors: int
    parameters: int
    passes: int
    bytes_read: int
    bytes_written: int
    bytes_applied: int
    shards: int
    peak_memory: int
    notes: tuple[str, ...]


def costs(
    plan: MergePlan,
    config: MergeConfiguration,
    options: MergeOptions,
    checkpoints: Mapping[ModelReference, Checkpoint],
    rows: int | None,
) -> Costs:
    """Add up what a plan will cost; ``rows`` is the output's vocabulary, if that changes."""
    parameters = [_written_parameters(tensor, rows) for tensor in plan.tensors]
    shards = [
        sum(_written_bytes(tensor, rows) for tensor in shard)
        for shard in written_shards(plan, rows, options.out_shard_size)
    ]
    passes = _passes(plan)
    once = sum(_bytes_used(plan, checkpoint) for checkpoint in checkpoints.values())
    # A survey measures whole models, even those that slices take a few layers of.
    whole = sum(_bytes_held(checkpoint) for checkpoint in checkpoints.values())
    return Costs(
        method=config.merge_method,
        base=str(config.base_model) if config.base_model else None,
        experts=tuple(sorted(str(m) for m in checkpoints if m != config.base_model)),
        tensors=len(plan.tensors),
        parameters=sum(parameters),
        passes=passes,
        bytes_read=once + (passes - 1) * whole,
        bytes_written=sum(shards),
        bytes_applied=sum(_bytes_applied(c, options) for c in checkpoints.values()),
        shards=len(shards),
        peak_memory=max(shards, default=0)
        + max(map(_memory, plan.tensors, parameters), default=0)
        + _pickled(checkpoints, options),
        notes=tuple(_notes(plan, checkpoints)),
    )


def written_shards(plan: MergePlan, rows: int | None, limit: int) -> list[list[Planned]]:
    """Return the tensors of each weight file, which MergeKit's writer fills one after another.

    Args:
        plan: what will be written.
        rows: the output's vocabulary, if that changes.
        limit: the size of a file, in bytes; 0 for one file.
    """
    shards: list[list[Planned]] = []
    filled = 0
    for tensor in plan.tensors:
        size = _written_bytes(tensor, rows)
        if not shards or (limit > 0 and filled + size > limit):
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _written_bytes(tensor: Planned, rows: int | None) -> int:
    return _written_parameters(tensor, rows) * tensor.written_dtype.itemsize


def _written_parameters(tensor: Planned, rows: int | None) -> int:
    shapes = [header.shape for header in tensor.stored.values()] or [()]
    axis = tensor.task.output_weight.vocabulary_axis
    if axis is None or not tensor.vocabulary_is_aligned:
        return math.prod(shapes[0])
    shared = rows or min(shape[axis] for shape in shapes)
    return math.prod((*shapes[0][:axis], shared, *shapes[0][axis + 1 :]))


def _passes(plan: MergePlan) -> int:
    chosen = {dict(t.task.parameters.items()).get("granularity") for t in plan.tensors}
    return 2 if chosen & {"layer", "model"} else 1


def _bytes_held(checkpoint: Checkpoint) -> int:
    return sum(header.bytes for header in checkpoint.weights.tensors.values())


def _bytes_used(plan: MergePlan, checkpoint: Checkpoint) -> int:
    """Return the size of the tensors that are merged; of all, if some have to be converted."""
    used = {}
    for tensor in plan.tensors:
        header = tensor.stored.get(checkpoint.model)
        if header is not None and not header.file:
            return _bytes_held(checkpoint)
        if header is not None:
            used[id(header)] = header
    return sum(header.bytes for header in used.values())


def _bytes_applied(checkpoint: Checkpoint, options: MergeOptions) -> int:
    """Return what MergeKit writes when it applies an adapter."""
    if checkpoint.to_apply is None:
        return 0
    dtype = dtype_from_name(options.lora_merge_dtype)
    return sum(
        math.prod(header.shape) * dtype.itemsize if dtype else header.bytes
        for header in checkpoint.weights.tensors.values()
    )


def _memory(tensor: Planned, parameters: int) -> int:
    """Return about how many bytes are held while one tensor is merged."""
    inputs = sum(math.prod(header.shape) for header in tensor.stored.values())
    dtypes = {tensor.merged_dtype, tensor.written_dtype}
    outputs = sum(parameters * dtype.itemsize for dtype in dtypes)
    work = _work(tensor, len(tensor.stored), parameters)
    return inputs * tensor.merged_dtype.itemsize + outputs + work


def _work(tensor: Planned, models: int, parameters: int) -> int:
    """Return what a method holds besides its inputs and its result, as measured."""
    method = merge_methods.get(tensor.task.method_name)
    if isinstance(method, MetaGPTMerge):
        if method.is_plain:
            return _BUFFERS
        method = method.stock
    if isinstance(method, GeneralizedTaskArithmeticMerge) and (
        method.sparsification_method or method.consensus_method
    ):
        # Sorting one task vector, or choosing the signs of all.
        return parameters * 4 * max(models + 8, 3 * models)
    return parameters * tensor.merged_dtype.itemsize * (models + 2)


def _pickled(checkpoints: Mapping[ModelReference, Checkpoint], options: MergeOptions) -> int:
    """Return the size of the pickled files that MergeKit holds in memory, one per model."""
    if options.lazy_unpickle:
        return 0
    total = 0
    for checkpoint in checkpoints.values():
        files: dict[str, int] = {}
        for header in checkpoint.weights.tensors.values():
            if not header.file.endswith(".safetensors"):
                files[header.file] = files.get(header.file, 0) + header.bytes
        total += max(files.values(), default=0)
    return total


def _notes(plan: MergePlan, checkpoints: Mapping[ModelReference, Checkpoint]) -> Iterator[str]:
    yield (
        "Headers do not show NaN, Inf or experts that equal the base: mergekit-metagpt "
        "coefficients and the merge itself find those."
    )
    dtypes = sorted({h.dtype for tensor in plan.tensors for h in tensor.stored.values()})
    if len(dtypes) > 1:
        yield f"The models are stored as {', '.join(dtypes)}; each tensor is merged in the widest."
    for model, checkpoint in checkpoints.items():
        if checkpoint.to_apply:
            yield (
                f"MergeKit first writes {model} with its adapter applied to {checkpoint.to_apply}."
            )
