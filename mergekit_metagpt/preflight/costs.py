"""What a merge will cost: bytes, passes and files."""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
from mergekit.common import dtype_from_name

from mergekit_metagpt.core.decision import Rule
from mergekit_metagpt.core.directions import merge_directions
from mergekit_metagpt.planning.job import Job

_TRIAL = 4096, 1024  # rows and columns


@dataclass(frozen=True)
class Costs:
    """What a merge will cost."""

    tensors: int  # of the output
    parameters: int  # the numbers in them
    passes: int  # how often the models are read
    bytes_read: int  # the tensors that all passes read together
    bytes_written: int  # the tensors of the output
    bytes_applied: int  # the models that MergeKit first writes to the LoRA cache
    shards: int  # the weight files of the output
    by_direction: Counter[tuple[int, torch.dtype]]  # the numbers, by experts and dtype
    device: torch.device  # that merges them

    @property
    def arithmetic(self) -> float:
        """The seconds that directions take, from trials on this machine; 0 if there are none."""
        trials = (count * _trial(*kind, self.device) for kind, count in self.by_direction.items())
        return math.fsum(trials)


def costs(job: Job) -> Costs:
    """Add up what a merge will cost."""
    outputs, rows, models = job.outputs.tensors, job.outputs.rows, job.models.values()
    chosen = [tensor.granularity for tensor in outputs]
    passes = 2 if any(granularity.needs_survey for granularity in chosen) else 1
    # A survey measures whole models, even if slices take only a few of their layers.
    held = {it.model: it.weights.tensors for it in models}
    used = {(model, name) for it in outputs for model, names in it.read.items() for name in names}
    whole = sum(header.bytes for headers in held.values() for header in headers.values())
    by_direction: Counter[tuple[int, torch.dtype]] = Counter()
    for tensor in outputs:
        if tensor.granularity.by_direction and len(tensor.stored) > 1:
            kind = (len(tensor.stored) - 1, tensor.merged_dtype)
            by_direction[kind] += tensor.written_parameters(None)
    dtype = dtype_from_name(job.options.lora_merge_dtype)
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
        shards=len(job.outputs.shards(job.options.out_shard_size)),
        by_direction=by_direction,
        device=torch.device(job.options.device or "cpu"),
    )


def _trial(experts: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds per number of a matrix, from merges of less than a second each."""
    own = torch.Generator("cpu").manual_seed(0)  # the caller's random numbers stay as they were
    base, *others = (
        torch.randn(_TRIAL, generator=own, dtype=torch.float32, device="cpu").to(device, dtype)
        for _ in range(experts + 1)
    )
    out, rule = torch.empty_like(base), Rule([1.0] * experts)
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        merge_directions(base, others, rule, out=out)
        float(out[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds) / math.prod(_TRIAL)
