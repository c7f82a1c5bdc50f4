"""Sparsified merges: the bytes of MergeKit's own, without its sorts and whole temporaries.

What is kept of each task vector is found first. The rest of MergeKit's method works on each number
by itself, so it runs on chunks, with density 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from torch import Tensor

from mergekit_metagpt.measure.survey import TensorInputs
from mergekit_metagpt.method.masks import Kept, Masks, OnlyMergeKitKnowsError, deltas
from mergekit_metagpt.task_vectors import working_dtype


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
    if _is_simple(inputs):
        try:
            return _merge_chunks(stock, inputs, _kept(stock, inputs, parameters), parameters)
        except OnlyMergeKitKnowsError:
            pass
    base = inputs.base
    # The stock method computes in the base's dtype, and its result has that dtype.
    exact = base.to(working_dtype(base.dtype))
    merged: Tensor = stock.merge_group(_group(inputs, exact, inputs.experts), **parameters)
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
    names = [name for name in ("density", "gamma", "epsilon") if name in parameters]
    return [
        masks.kept(
            stock.sparsification_method,
            expert,
            rescale=parameters["rescale"],
            **{name: parameters[name][id_] for name in names},
        )
        for id_, expert in zip(inputs.ids, inputs.experts, strict=True)
    ]


def _merge_chunks(
    stock: GeneralizedTaskArithmeticMerge,
    inputs: TensorInputs,
    kept: Sequence[Kept],
    parameters: Mapping[str, Any],
) -> Tensor:
    """Add sparsified task vectors to the base, each chunk with MergeKit's own method."""
    merged = torch.empty_like(inputs.base, requires_grad=False)
    flat = merged.view(-1)
    # `lambda` is applied here, last as in MergeKit. Its zero base hides the sign of a product of 0.
    scale = parameters["lambda"]
    dense = {**parameters, "density": dict.fromkeys(inputs.ids, 1.0), "lambda": 1.0}
    for start, base, chunks in deltas(inputs.base, *inputs.experts):
        sparse = [own.of(chunk, start) for own, chunk in zip(kept, chunks, strict=True)]
        mixed: Tensor = stock.merge_group(_group(inputs, torch.zeros_like(base), sparse), **dense)
        if scale != 1:
            mixed *= scale
        flat[start : start + len(base)] = mixed.add_(base)
    return merged


def _group(inputs: TensorInputs, base: Tensor, experts: Sequence[Tensor]) -> TensorGroup:
    ids = [inputs.base_id, *inputs.ids]
    return TensorGroup.from_tensors([base, *experts], ids=ids, base_index=0, name=inputs.name)
