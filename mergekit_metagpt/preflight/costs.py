"""What a merge will cost: bytes, passes and files."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.core.decision import Rule
from mergekit_metagpt.core.directions import merge_directions
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.outputs import Outputs, output_shards

_TRIAL = 1024  # rows and columns


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
        arithmetic: the seconds that directions take on this machine; 0 if there are none.
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
    arithmetic: float
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
        arithmetic=_arithmetic(outputs, options),
        notes=tuple(_notes(outputs, models)),
    )


def _arithmetic(outputs: Outputs, options: MergeOptions) -> float:
    """Return the seconds that directions take, from a trial on this machine."""
    numbers: Counter[tuple[int, torch.dtype]] = Counter()
    for tensor in outputs.tensors:
        if tensor.merge.by_direction and len(tensor.stored) > 1:
            kind = (len(tensor.stored) - 1, tensor.merged_dtype)
            numbers[kind] += tensor.written_parameters(None)
    return math.fsum(count * _trial(*kind, options) for kind, count in numbers.items())


def _trial(experts: int, dtype: torch.dtype, options: MergeOptions) -> float:
    """Return the seconds per number of a matrix that takes a few tenths of a second to merge."""
    device = torch.device(options.device or "cpu")
    own = torch.Generator("cpu").manual_seed(0)  # the caller's random numbers stay as they were
    drawn = torch.randn(experts + 1, _TRIAL, _TRIAL, generator=own, device="cpu")
    base, *others = drawn.to(device, dtype)
    out, rule = torch.empty_like(base), Rule([1.0] * experts)
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        merge_directions(base, others, rule, out=out)
        float(out[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds) / _TRIAL**2


def _passes(outputs: Outputs) -> int:
    chosen = {tensor.merge.granularity for tensor in outputs.tensors}
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
