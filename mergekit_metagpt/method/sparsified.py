"""MergeKit's sparsified merges, chunk by chunk, without its sorts and whole temporaries.

As many numbers are kept as ``mergekit.sparsify`` keeps, by the same rules and random draws. Of
equal magnitudes the first in memory are kept; with MergeKit, those that its sort happens to put
first, which differ from platform to platform.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.core.arrays import as_array, count_of, places_in_order, places_of
from mergekit_metagpt.core.buffers import chunk_size
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.order_statistics import magnitudes_of, order_statistics
from mergekit_metagpt.core.task_vectors import Sum, deltas_of, working_dtype
from mergekit_metagpt.method.random_streams import own_stream

_LEAST = 2.0**-149  # the least positive float32


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
    masks = base.new_ones((len(experts), len(base)), dtype=torch.int8)
    factors = base.new_ones((len(experts), 1), dtype=torch.float32)
    for id_, expert, mask, factor in zip(inputs.ids, experts, masks, factors, strict=True):
        own = {k: parameters[k][id_] for k in ("density", "gamma", "epsilon") if k in parameters}
        _sparsify(mask, base, expert, stock.sparsification_method, inputs.base.shape, **own)
        if parameters["rescale"]:
            factor.fill_(_factor(mask, base, expert))
    weights = base.new_tensor([[parameters["weight"][i]] for i in inputs.ids], dtype=torch.float32)
    merged = torch.empty_like(base)
    for chunk, start, deltas in deltas_of(base, experts, chunk_size(base.device)):
        # Row by row, as in deltas_of: a core then works on the same columns each time. Those that
        # it takes from another core's cache take three times as long.
        for delta, mask, factor, weight in zip(deltas, masks, factors, weights, strict=True):
            delta.mul_(mask[chunk]).mul_(factor).mul_(weight)
        mixed = _mixed(deltas, weights, stock.consensus_method, parameters)
        merged[chunk] = mixed.add_(start)
    return merged.view(inputs.base.shape)


def _sparsify(
    mask: Tensor,
    base: Tensor,
    expert: Tensor,
    method: SparsificationMethod | None,
    shape: Sequence[int],
    density: float,
    gamma: float = 0,
    epsilon: float = 0,
) -> None:
    """Write 0 into a mask of ones (int8) where ``mergekit.sparsify`` drops a number of θ_t − θ_0.

    The tensors are flat; DELLA needs the shape that they had.
    """
    size = len(mask)
    if method is None or density >= 1:
        return
    if method == SparsificationMethod.random:
        for part in torch.split(mask, chunk_size(mask.device)):
            _draw(part, density)
    elif density <= 0:
        mask.zero_()
    elif method == SparsificationMethod.magnitude:
        _keep_between(mask, base, expert, size - max(1, int(density * size)), size)
    elif method == SparsificationMethod.magnitude_outliers:
        count = int(density * size)
        start = max(0, size - count - int(gamma * size))
        _keep_between(mask, base, expert, start, start + count)
    else:
        _draw_by_rank(mask, base, expert, shape, density, epsilon)


def _keep_between(mask: Tensor, base: Tensor, expert: Tensor, start: int, stop: int) -> None:
    """Keep what is at ``[start:stop]`` when the smallest magnitude comes first.

    Of equal magnitudes the first in memory are kept.
    """
    if start == stop:
        mask.zero_()
        return
    size = max(1, chunk_size(base.device) // 4)  # for one core's cache
    # If there are no outliers to drop, there is no second end to find.
    ends = order_statistics(base, expert, [start] if stop == len(mask) else [start, stop - 1], size)
    quotas = {end.value: min(end.stop, stop) - max(end.start, start) for end in ends}
    marks = as_array(mask)
    for chunk, magnitudes in magnitudes_of(base, expert, size):
        kept = magnitudes > ends[0].value
        if len(ends) > 1:
            kept &= magnitudes < ends[1].value
        for value, quota in quotas.items():
            if quota:
                equal = magnitudes == value
                count = count_of(equal)
                if count > quota:
                    equal[places_of(equal)[quota:]] = False
                kept |= equal
                quotas[value] -= min(count, quota)
        marks[chunk] = kept


def _draw_by_rank(
    mask: Tensor, base: Tensor, expert: Tensor, shape: Sequence[int], density: float, epsilon: float
) -> None:
    """Draw numbers, the larger ones of those along the second axis with a higher probability."""
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError("Epsilon must be chosen such that density +/- epsilon is in (0, 1)")
    length, *inner = shape[1:] if len(shape) > 1 else shape
    apart = math.prod(inner)
    ranks = torch.arange(length, dtype=torch.float32, device=base.device)
    by_rank = ranks.div_(length - 1).mul_(2 * epsilon).add_(density - epsilon)
    rows = max(1, chunk_size(base.device) // (length * apart)) * length * apart
    for part, start, end in zip(*(torch.split(t, rows) for t in (mask, base, expert)), strict=True):
        magnitudes = (end.float() - start.float()).abs_().view(-1, length, apart).transpose(1, 2)
        # From the last to the first, so that the first of equal magnitudes has the highest rank.
        order = places_in_order(as_array(magnitudes.reshape(-1, length).flip(1)))
        order = torch.as_tensor(order, device=base.device).neg_().add_(length - 1)
        probabilities = torch.empty_like(order, dtype=torch.float32)
        probabilities.scatter_(1, order, by_rank.expand_as(order))
        _draw(part, probabilities.view_as(magnitudes).transpose(1, 2).reshape(-1))


def _draw(mask: Tensor, probability: Tensor | float) -> None:
    """Write 1 with a probability, or else 0; on the CPU, what ``torch.bernoulli`` draws."""
    uniform = torch.rand(len(mask), dtype=torch.float32, device=mask.device)
    mask.copy_(uniform.lt_(probability))


def _factor(mask: Tensor, base: Tensor, expert: Tensor) -> float:
    """Return what the kept numbers are multiplied by, so that ‖τ‖₁ stays the same."""
    before, after = Sum(), Sum()
    for chunk, _, [delta] in deltas_of(base, [expert], chunk_size(base.device)):
        before.add(delta.abs_())
        after.add(delta.mul_(mask[chunk]))
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
