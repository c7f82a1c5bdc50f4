"""What a merge will cost: bytes, passes and files."""

import math
from dataclasses import dataclass

from mergekit.common import dtype_from_name

from mergekit_metagpt.planning.config import most_frequent
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.outputs import output_shards


@dataclass(frozen=True)
class Costs:
    """What a merge will cost.

    Attributes:
        tensors: how many tensors the output will have.
        parameters: how many numbers these hold together.
        passes: how often the models are read.
        bytes_read: the bytes of tensors that all passes read together.
        bytes_written: the bytes of tensors in the output.
        bytes_applied: the bytes of models that MergeKit first writes to the LoRA cache.
        shards: how many weight files the output will have.
        note: what the merge will choose by itself, in one sentence; empty if nothing.
    """

    tensors: int
    parameters: int
    passes: int
    bytes_read: int
    bytes_written: int
    bytes_applied: int
    shards: int
    note: str


def costs(job: Job) -> Costs:
    """Add up what a merge will cost."""
    outputs, rows, models = job.outputs.tensors, job.outputs.rows, job.models.values()
    chosen = [tensor.merge.granularity for tensor in outputs]
    passes = 2 if any(granularity and granularity.needs_survey for granularity in chosen) else 1
    # A survey measures whole models, even if slices take only a few of their layers.
    held = {it.model: it.weights.tensors for it in models}
    used = {(model, name) for it in outputs for model, names in it.read.items() for name in names}
    whole = sum(header.bytes for headers in held.values() for header in headers.values())
    dtype, tie = dtype_from_name(job.options.lora_merge_dtype), most_frequent(job.parsed)
    applied = sum(
        math.prod(header.shape) * dtype.itemsize if dtype else header.bytes
        for it in models
        for header in (held[it.model].values() if it.to_apply else ())
    )
    return Costs(
        tensors=len(outputs),
        parameters=sum(tensor.written_parameters(rows) for tensor in outputs),
        passes=passes,
        bytes_read=sum(held[model][name].bytes for model, name in used) + (passes - 1) * whole,
        bytes_written=sum(tensor.written_bytes(rows) for tensor in outputs),
        bytes_applied=applied,
        shards=len(output_shards(outputs, rows, job.options.out_shard_size)),
        note=tie.note if tie else "",
    )
