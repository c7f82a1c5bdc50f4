"""What a merge will cost: bytes, passes and files."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.core.normal_equations import costs_of_matrix
from mergekit_metagpt.method.parameters import side_of
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.outputs import Outputs, OutputTensor, output_shards
from mergekit_metagpt.preflight.tensors import granularity_of

# What a few cores multiply in a second, and what takes them a quarter of an hour.
_RATE = 1e11
_MANY = 900 * _RATE


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
        bytes_read: the bytes of tensors that all passes read together.
        bytes_written: the bytes of tensors in the output.
        bytes_applied: the bytes of models that MergeKit first writes to the LoRA cache.
        shards: how many weight files there will be.
        operations: the float64 operations of matrices of coefficients; 0 if there are none.
        working_memory: the bytes that the largest of them needs besides its inputs.
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
    operations: float
    working_memory: int
    notes: tuple[str, ...]


def costs(
    outputs: Outputs,
    config: MergeConfiguration,
    options: MergeOptions,
    models: Mapping[ModelReference, ModelFiles],
    rows: int | None,
) -> Costs:
    """Add up what a merge will cost; ``rows`` is the output's vocabulary, if that changes."""
    parameters = [tensor.written_parameters(rows) for tensor in outputs.tensors]
    shards = [
        sum(tensor.written_bytes(rows) for tensor in shard)
        for shard in output_shards(outputs.tensors, rows, options.out_shard_size)
    ]
    passes = _passes(outputs)
    once = sum(_bytes_used(outputs, files) for files in models.values())
    # A survey measures whole models, even if slices take only a few of their layers.
    whole = sum(_bytes_held(files) for files in models.values())
    directions = [found for tensor in outputs.tensors if (found := _of_directions(tensor))]
    operations = sum(found[0] for found in directions)
    return Costs(
        method=config.merge_method,
        base=str(config.base_model) if config.base_model else None,
        experts=tuple(sorted(str(m) for m in models if m != config.base_model)),
        tensors=len(outputs.tensors),
        parameters=sum(parameters),
        passes=passes,
        bytes_read=once + (passes - 1) * whole,
        bytes_written=sum(shards),
        bytes_applied=sum(_bytes_applied(c, options) for c in models.values()),
        shards=len(shards),
        operations=operations,
        working_memory=max((memory for _, memory in directions), default=0),
        notes=(*_notes(outputs, models), *_advice(operations, options)),
    )


def _of_directions(tensor: OutputTensor) -> tuple[float, int] | None:
    """Return the operations and the working memory, in bytes, of matrices of coefficients."""
    shapes = [header.shape for header in tensor.stored.values()]
    is_diagonal = tensor.merge.vocabulary_axis is not None
    if not tensor.merge.has_matrices or not shapes or len(shapes[0]) < 2 or is_diagonal:
        return None
    *stack, rows, columns = shapes[0]
    side = side_of(tensor.merge.parameters, tensor.stored.keys() - {tensor.merge.base})
    operations, numbers = costs_of_matrix(rows, columns, len(shapes) - 1, side)
    return math.prod(stack) * operations, 8 * numbers


def _advice(operations: float, options: MergeOptions) -> Iterator[str]:
    """Say when a GPU is advisable: a few cores need more than some minutes."""
    if operations > _MANY and (options.device or "cpu") == "cpu":
        yield (
            f"Granularity direction takes {operations / 1e12:,.0f} trillion float64 operations, "
            f"about {operations / _RATE / 60:,.0f} minutes at {_RATE / 1e9:.0f} billion a second, "
            "which a few cores reach; a GPU with fast float64 (--device cuda) is advisable."
        )


def _passes(outputs: Outputs) -> int:
    chosen = {granularity_of(tensor) for tensor in outputs.tensors}
    return 2 if any(granularity and granularity.needs_survey for granularity in chosen) else 1


def _bytes_held(files: ModelFiles) -> int:
    return sum(header.bytes for header in files.weights.tensors.values())


def _bytes_used(outputs: Outputs, files: ModelFiles) -> int:
    """Return the size of the tensors that are merged, or of all if some must be converted."""
    used = {}
    for tensor in outputs.tensors:
        header = tensor.stored.get(files.model)
        if header is not None and not header.file:
            return _bytes_held(files)
        if header is not None:
            used[id(header)] = header
    return sum(header.bytes for header in used.values())


def _bytes_applied(files: ModelFiles, options: MergeOptions) -> int:
    """Return what MergeKit writes when it applies an adapter."""
    if files.to_apply is None:
        return 0
    dtype = dtype_from_name(options.lora_merge_dtype)
    return sum(
        math.prod(header.shape) * dtype.itemsize if dtype else header.bytes
        for header in files.weights.tensors.values()
    )


def _notes(outputs: Outputs, models: Mapping[ModelReference, ModelFiles]) -> Iterator[str]:
    yield (
        "Headers do not show NaN, Inf or experts that equal the base: mergekit-metagpt "
        "coefficients and the merge itself find those."
    )
    dtypes = sorted({h.dtype for tensor in outputs.tensors for h in tensor.stored.values()})
    if len(dtypes) > 1:
        yield f"The models are stored as {', '.join(dtypes)}; each tensor is merged in the widest."
    for model, files in models.items():
        if files.to_apply:
            yield (f"MergeKit first writes {model} with its adapter applied to {files.to_apply}.")
