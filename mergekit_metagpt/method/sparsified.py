"""MergeKit's sparsified merges, chunk by chunk, without its sorts and whole temporaries.

As many numbers are kept as ``mergekit.sparsify`` keeps, by the same rules and random draws. Of
equal magnitudes the first in memory are kept; with MergeKit, those that its sort happens to put
first, which differ from platform to platform.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.core.arrays import as_array, on_all_cores, places_of
from mergekit_metagpt.core.buffers import Room, chunk_size, room_for
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.order_statistics import Magnitudes, order_statistics
from mergekit_metagpt.core.ranks import kept_by_rank
from mergekit_metagpt.core.task_vectors import Sum, deltas_of, working_dtype
from mergekit_metagpt.method.random_streams import own_stream

# A core selects by itself, in this part of the chunks that torch divides among all of them.
_PARTS = 2
_PARTS_TO_SORT = 16  # keys are int64, and are copied
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
    _sparsify(masks, base, experts, stock.sparsification_method, inputs, parameters)
    if parameters["rescale"]:
        for mask, expert, factor in zip(masks, experts, factors, strict=True):
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
    masks: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    method: SparsificationMethod | None,
    inputs: TensorInputs,
    parameters: Mapping[str, Any],
) -> None:
    """Write 0 into masks of ones (int8) where ``mergekit.sparsify`` drops numbers of θ_t − θ_0.

    The tensors are flat; DELLA needs the shape that they had.
    """
    size, kept = len(base), dict[int, tuple[int, int]]()  # by expert
    for t, (id_, mask) in enumerate(zip(inputs.ids, masks, strict=True)):
        density = parameters["density"][id_] if method else 1.0
        if density >= 1:
            continue
        if method == SparsificationMethod.random:
            for part in torch.split(mask, chunk_size(mask.device)):
                as_array(part)[:] = as_array(_drawn(part)) < density
        elif density <= 0:
            mask.zero_()
        elif method == SparsificationMethod.magnitude:
            kept[t] = size - max(1, int(density * size)), size
        elif method == SparsificationMethod.magnitude_outliers:
            count = int(density * size)
            start = max(0, size - count - int(parameters["gamma"][id_] * size))
            if count:
                kept[t] = start, start + count
            else:
                mask.zero_()
        else:
            epsilon = parameters["epsilon"][id_]
            _draw_by_rank(mask, base, experts[t], inputs.base.shape, density, epsilon)
    if kept:
        its = [experts[t] for t in kept]
        _keep_between([masks[t] for t in kept], base, its, list(kept.values()))


def _keep_between(
    masks: Sequence[Tensor],
    base: Tensor,
    experts: Sequence[Tensor],
    kept: Sequence[tuple[int, int]],
) -> None:
    """Keep of each expert what is from start to stop when the smallest magnitude comes first.

    Of equal magnitudes the first in memory are kept.
    """
    size = len(base)
    chunks = _chunks(size, chunk_size(base.device) // _PARTS)
    magnitudes = Magnitudes(base, experts, chunks)
    # If there are no outliers to drop, there is no second end to find.
    places = [[start] if stop == size else [start, stop - 1] for start, stop in kept]
    ends = order_statistics(magnitudes, places)
    quotas = [[end.within(*kept[t]) for end in its] for t, its in enumerate(ends)]

    def keep(pair: tuple[int, int], room: Room) -> None:
        t, number = pair
        its, both = magnitudes.of(t, chunks[number], room), zip(ends[t], quotas[t], strict=True)
        cuts = [(end.value, end.equals[number], quota[number]) for end, quota in both]
        # Where all equals are kept, a comparison includes them; where only some are, they follow.
        (value, equals, quota), *upper = cuts
        flags = magnitudes.flags("greater" + "_equal" * (quota == equals), its, value, room)
        for value, equals, quota in upper:
            comparison = "less" + "_equal" * (quota == equals)
            flags &= magnitudes.flags(comparison, its, value, room, number=1)
        for value, equals, quota in cuts:
            if 0 < quota < equals:
                flags[places_of(its == value)[:quota]] = True
        as_array(masks[t])[chunks[number]] = flags

    on_all_cores(keep, list(product(range(len(experts)), range(len(chunks)))), base.device)


def _draw_by_rank(
    mask: Tensor, base: Tensor, expert: Tensor, shape: Sequence[int], density: float, epsilon: float
) -> None:
    """Draw numbers, the larger ones of those along the second axis with a higher probability."""
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError("Epsilon must be chosen such that density +/- epsilon is in (0, 1)")
    length, *inner = shape[1:] if len(shape) > 1 else shape
    apart = math.prod(inner)
    ranks = torch.arange(length, dtype=torch.float32, device=base.device)
    by_rank = as_array(ranks.div_(length - 1).mul_(2 * epsilon).add_(density - epsilon))
    for part in _chunks(len(mask), chunk_size(base.device), length * apart):
        _draw_part(mask[part], base[part], expert[part], apart, by_rank)


def _draw_part(mask: Tensor, base: Tensor, expert: Tensor, apart: int, by_rank: Any) -> None:
    """Draw numbers with the probabilities of their ranks; ``apart`` lie those of one row."""
    unit = len(by_rank) * apart
    parts = _chunks(len(mask), chunk_size(base.device) // _PARTS_TO_SORT, unit)
    magnitudes = Magnitudes(base, [expert], parts)
    marks, drawn = as_array(mask), as_array(_drawn(mask))

    def rows_of(flat: Any) -> Any:
        return flat.reshape(-1, len(by_rank), apart).swapaxes(1, 2)

    def keep(part: slice, room: Room) -> None:
        rows = rows_of(magnitudes.of(0, part, room))
        rows_of(marks[part])[:] = kept_by_rank(rows, rows_of(drawn[part]), by_rank)

    on_all_cores(keep, parts, base.device)


def _chunks(size: int, chunk: int, unit: int = 1) -> list[slice]:
    """Return parts of about a chunk, each of whole units."""
    step = max(1, chunk // unit) * unit
    return [slice(start, start + step) for start in range(0, size, step)]


def _drawn(like: Tensor) -> Tensor:
    """Return numbers from 0 to 1 in float32, as ``torch.bernoulli`` draws them on the CPU.

    The next call in this thread overwrites them.
    """
    return room_for(like, torch.float32, len(like)).uniform_()


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
