"""MergeKit's sparsified merges, chunk by chunk, without its sorts and whole temporaries.

As many numbers are kept as ``mergekit.sparsify`` keeps, by the same rules and random draws. Of
equal magnitudes the first in memory are kept; with MergeKit, those that its sort happens to put
first, which differ from platform to platform.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.core.buffers import chunk_size, parts_of
from mergekit_metagpt.core.draws import drawn, drawn_by_rank
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.order_statistics import OrderStatistic, order_statistics
from mergekit_metagpt.core.task_vectors import Sum, deltas_of, working_dtype
from mergekit_metagpt.method.random_streams import own_stream

# The task vectors of several experts are mixed side by side, so in this part of a chunk: whole
# rows of what ``Sum`` adds up, so that sums do not depend on it.
_PARTS = 4
_LEAST = torch.finfo(torch.float32).tiny  # smaller ones may be flushed to 0

# Sets to 0 what is dropped of a chunk of a task vector; the number of the chunk tells where it is.
Keep = Callable[[Tensor, int], None]


def merge_sparsified(
    stock: GeneralizedTaskArithmeticMerge, inputs: TensorInputs, parameters: Mapping[str, Any]
) -> Tensor:
    """Merge a tensor as MergeKit's method does with a float32 base, rounded to its dtype once.

    ``weight`` holds λ_t by expert.
    """
    if stock.sparsification_method == SparsificationMethod.della_magprune:
        _require_ranks(inputs, parameters["density"].values())
    with own_stream(inputs.base.device, f"{stock.spec.name}/{inputs.name}"):
        return _merge(stock, inputs, parameters)


def _require_ranks(inputs: TensorInputs, densities: Iterable[float]) -> None:
    """Refuse rows of one number, which DELLA cannot rank: MergeKit would divide by 0."""
    shape = inputs.base.shape
    row = shape[1] if len(shape) > 1 else shape.numel()
    if row == 1 and any(0 < density < 1 for density in densities):
        raise ValueError(
            f"DELLA cannot rank the numbers of tensor {inputs.name} of shape {list(shape)}: "
            "each row has only one; set its density to 1 with a filter, or choose a DARE method."
        )


def _merge(
    stock: GeneralizedTaskArithmeticMerge, inputs: TensorInputs, parameters: Mapping[str, Any]
) -> Tensor:
    tensors = [inputs.base, *inputs.experts]
    has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    is_subclass = type(stock) is not GeneralizedTaskArithmeticMerge
    if has_gradients or is_subclass or inputs.dtype == torch.float64:  # MergeKit's own code does it
        tensors[0] = inputs.base.to(working_dtype(inputs.base.dtype))
        ids = [inputs.base_id, *inputs.ids]
        group = TensorGroup.from_tensors(tensors, ids=ids, base_index=0, name=inputs.name)
        result: Tensor = stock.merge_group(group, **parameters)
        return result.to(inputs.base.dtype)

    base, *experts = (tensor.detach().reshape(-1) for tensor in tensors)
    chunks = parts_of(len(base), chunk_size(base.device) // _PARTS)
    keeps = _keeps(base, experts, chunks, stock.sparsification_method, inputs, parameters)
    factors = [1.0] * len(experts)
    if parameters["rescale"]:
        factors = [_factor(base, *pair, chunks) for pair in zip(experts, keeps, strict=True)]
    weights = base.new_tensor([[parameters["weight"][i]] for i in inputs.ids], dtype=torch.float32)
    merged = torch.empty_like(base)
    for number, (start, deltas) in enumerate(deltas_of(base, experts, chunks)):
        # Row by row, as in deltas_of: a core then works on the same columns each time. Those that
        # it takes from another core's cache take three times as long.
        for delta, keep, factor, weight in zip(deltas, keeps, factors, weights, strict=True):
            keep(delta, number)
            delta.mul_(factor).mul_(weight)
        mixed = _mixed(deltas, weights, stock.consensus_method, parameters)
        merged[chunks[number]] = mixed.add_(start)
    return merged.view(inputs.base.shape)


def _keeps(
    base: Tensor,
    experts: Sequence[Tensor],
    chunks: Sequence[slice],
    method: SparsificationMethod | None,
    inputs: TensorInputs,
    parameters: Mapping[str, Any],
) -> list[Keep]:
    """Return functions that set numbers of each θ_t − θ_0 to 0 as ``mergekit.sparsify`` does.

    The tensors are flat; DELLA needs the shape that they had.
    """
    size, keeps, ranges = len(base), dict[int, Keep](), dict[int, range]()
    for t, (id_, expert) in enumerate(zip(inputs.ids, experts, strict=True)):
        density = parameters["density"][id_] if method else 1.0
        if density >= 1:
            keeps[t] = _keep_all
        elif method == SparsificationMethod.random:
            keeps[t] = partial(_keep_marked, drawn(density, base, chunks), chunks)
        elif density <= 0:
            continue
        elif method == SparsificationMethod.magnitude:
            ranges[t] = range(size - max(1, int(density * size)), size)
        elif method == SparsificationMethod.magnitude_outliers:
            count = int(density * size)
            start = max(0, size - count - int(parameters["gamma"][id_] * size))
            ranges[t] = range(start, start + count)
        else:
            epsilon = parameters["epsilon"][id_]
            marks = drawn_by_rank(base, expert, inputs.base.shape, density, epsilon)
            keeps[t] = partial(_keep_marked, marks, chunks)
    ranges = {t: its for t, its in ranges.items() if its}
    if ranges:
        # If there are no outliers to drop, there is no second end to find.
        places = [[its[0]] if its.stop == size else [its[0], its[-1]] for its in ranges.values()]
        ends = order_statistics(base, [experts[t] for t in ranges], chunks, places)
        for (t, its), both in zip(ranges.items(), ends, strict=True):
            keeps[t] = partial(_keep_between, [(end, end.first_within(its)) for end in both])
    return [keeps.get(t, _keep_none) for t in range(len(experts))]


def _keep_all(delta: Tensor, number: int) -> None:
    pass


def _keep_none(delta: Tensor, number: int) -> None:
    delta.mul_(0)  # keeps the sign of 0


def _keep_marked(marks: Tensor, chunks: Sequence[slice], delta: Tensor, number: int) -> None:
    delta.mul_(marks[chunks[number]])


def _keep_between(
    ends: Sequence[tuple[OrderStatistic, Sequence[int]]], delta: Tensor, number: int
) -> None:
    """Keep the magnitudes between a lower end and perhaps an upper one.

    Of those that equal an end, so many of each chunk are kept, the first in memory.
    """
    magnitudes = delta.abs()
    for (end, counts), names in zip(ends, (("gt", "ge"), ("lt", "le")), strict=False):
        first, equals = counts[number], end.equals[number]
        # Where all equals are kept, a comparison includes them; where only some are, they follow.
        compare = getattr(torch, names[first == equals])
        kept = compare(magnitudes, end.value, out=torch.empty_like(delta))
        if 0 < first < equals:
            kept[(magnitudes == end.value).nonzero()[:first, 0]] = 1
        delta.mul_(kept)


def _factor(base: Tensor, expert: Tensor, keep: Keep, chunks: Sequence[slice]) -> float:
    """Return what the kept numbers are multiplied by, so that ‖τ‖₁ stays the same."""
    before, after = Sum(), Sum()
    for number, (_, [delta]) in enumerate(deltas_of(base, [expert], chunks)):
        before.add(delta.abs())
        keep(delta, number)
        after.add(delta.abs_())
    is_tiny = min(before.value, after.value) < 1e-7  # MergeKit does not rescale these
    return 1.0 if is_tiny else before.value / after.value


def _mixed(
    deltas: Tensor, weights: Tensor, consensus: ConsensusMethod | None, options: Mapping[str, Any]
) -> Tensor:
    """Return what MergeKit makes of T weighted task vectors, (T, n), which are overwritten.

    With a consensus method, only the numbers count that have the sign of the majority.
    """
    if consensus is None:
        mixed, divisor = deltas.sum(dim=0), weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    else:
        votes = deltas if consensus == ConsensusMethod.sum else deltas.sign()
        majority = votes.sum(dim=0).ge_(0).mul_(2).sub_(1)  # 1 or -1
        for delta in deltas:
            delta.mul_(majority).relu_()
        mixed = deltas.sum(dim=0).mul_(majority)
        for delta, weight in zip(deltas, weights, strict=True):
            delta.gt_(0).mul_(weight)
        # Where no number counts, 0 is divided by anything but 0.
        divisor = deltas.sum(dim=0).clamp_(min=_LEAST)
    if options["normalize"]:
        mixed /= divisor
    if options["lambda"] != 1:
        mixed *= options["lambda"]
    return mixed
