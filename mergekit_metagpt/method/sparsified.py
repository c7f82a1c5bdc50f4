"""Sparsified merges: the bytes of MergeKit's own, without its sorts and whole temporaries.

What is kept of each task vector is found first. The rest of MergeKit's method works on each number
by itself, so it runs on chunks, with density 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from torch import Tensor

from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.measure.survey import TensorInputs
from mergekit_metagpt.method.kept import Kept, chunks_of, deltas
from mergekit_metagpt.method.masks import Masks, OnlyMergeKitKnowsError

_LEAST = 2.0**-149  # the least positive float32


def merge_sparsified(
    stock: GeneralizedTaskArithmeticMerge, inputs: TensorInputs, parameters: Mapping[str, Any]
) -> Tensor:
    """Merge a tensor as MergeKit's method does with a float32 base, rounded to its dtype once.

    Args:
        stock: MergeKit's method.
        inputs: θ_0 and θ_t, of the same shape and device.
        parameters: those of the stock method; ``weight`` holds λ_t by expert.

    Returns:
        A tensor of the base's shape, dtype and device.
    """
    # A subclass may merge in another way.
    if type(stock) is GeneralizedTaskArithmeticMerge and _is_simple(inputs):
        try:
            return _merge_chunks(stock, inputs, _kept(stock, inputs, parameters), parameters)
        except OnlyMergeKitKnowsError:
            pass
    base = inputs.base
    # The stock method computes in the base's dtype, and its result has that dtype.
    exact = base.to(working_dtype(base.dtype))
    ids = [inputs.base_id, *inputs.ids]
    group = TensorGroup.from_tensors(
        [exact, *inputs.experts], ids=ids, base_index=0, name=inputs.name
    )
    merged: Tensor = stock.merge_group(group, **parameters)
    return merged.to(base.dtype)


def _is_simple(inputs: TensorInputs) -> bool:
    """Return whether this is a merge in float32 on the CPU, without strides and gradients."""
    tensors = [inputs.base, *inputs.experts]
    return (
        all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and inputs.dtype != torch.float64
        and inputs.base.numel() < 1 << 32
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _kept(
    stock: GeneralizedTaskArithmeticMerge, inputs: TensorInputs, parameters: Mapping[str, Any]
) -> list[Kept]:
    """Return what is kept of each task vector, drawn in the order of the experts."""
    masks = Masks(inputs.base)
    method = stock.sparsification_method
    names = [name for name in ("density", "gamma", "epsilon") if name in parameters]
    kept = [
        masks.kept(method, expert, **{name: parameters[name][id_] for name in names})
        for id_, expert in zip(inputs.ids, inputs.experts, strict=True)
    ]
    if parameters["rescale"]:
        return [masks.rescaled(*pair) for pair in zip(kept, inputs.experts, strict=True)]
    return kept


def _merge_chunks(
    stock: GeneralizedTaskArithmeticMerge,
    inputs: TensorInputs,
    kept: Sequence[Kept],
    parameters: Mapping[str, Any],
) -> Tensor:
    """Add sparsified task vectors to the base, chunk by chunk."""
    merged = torch.empty_like(inputs.base)
    flat = merged.view(-1)
    weights = torch.tensor([[parameters["weight"][id_]] for id_ in inputs.ids], device="cpu")
    chunks = chunks_of(inputs.base, len(inputs.experts))
    for chunk, base, vectors in deltas(chunks, inputs.base, *inputs.experts):
        for own, delta in zip(kept, vectors, strict=True):
            own.apply(delta, chunk.start)
        mixed = _mixed(vectors, weights, stock.consensus_method, parameters)
        flat[chunk] = mixed.add_(base)
    return merged


def _mixed(
    deltas: Tensor,
    weights: Tensor,
    consensus: ConsensusMethod | None,
    parameters: Mapping[str, Any],
) -> Tensor:
    """Return what MergeKit makes of T sparsified task vectors, (T, n), which are overwritten.

    With a consensus method, only the numbers count that have the sign of the majority.
    """
    deltas.mul_(weights)
    if consensus is None:
        mixed, divisor = deltas.sum(dim=0), weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    else:
        votes = deltas if consensus == ConsensusMethod.sum else deltas.sign()
        majority = votes.sum(dim=0).sign_().add_(0.5).sign_()  # 0 is positive
        agreeing = deltas.mul_(majority).relu_()
        mixed = agreeing.sum(dim=0).mul_(majority)
        # Where no number counts, 0 is divided by anything but 0.
        divisor = agreeing.sign_().mul_(weights).sum(dim=0).clamp_(min=_LEAST)
    if parameters["normalize"]:
        mixed /= divisor
    if parameters["lambda"] != 1:
        mixed *= parameters["lambda"]
    return mixed
