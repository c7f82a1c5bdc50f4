"""The merge methods that MergeKit sees.

The weight for each expert is the scaling coefficient λ_t of the MetaGPT paper. ``metagpt`` is plain
task arithmetic. Each ``metagpt_X`` is a sparsified method and follows MergeKit's X.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

# Submodules only: at registration the package `mergekit.merge_methods` is half imported.
from mergekit.merge_methods.base import (
    BatchOptions,
    GroupMergeMethod,
    MergeMethodSpec,
    TensorGroup,
)
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt.core.decision import Rule
from mergekit_metagpt.core.directions import Directions, merge_directions
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.roles import role_of
from mergekit_metagpt.core.task_vectors import add_task_vectors
from mergekit_metagpt.method.notes import WATCH, note
from mergekit_metagpt.method.parameters import exponent_of, with_priors
from mergekit_metagpt.method.provider import Models, Provider
from mergekit_metagpt.method.sparsified import merge_sparsified
from mergekit_metagpt.method.summary import Entry

# The end of the name that MergeKit's planner gives to a slice of a config.
_SLICE = re.compile(r"\.slices\[\d+\]$")
# Task vectors with smaller squared norms cannot overflow float32.
_LARGEST_SAFE_NORM = 1e74


@dataclass(frozen=True)
class MetaGPTMerge(GroupMergeMethod):
    """A task-vector method of MergeKit with the closed-form coefficients of MetaGPT.

    Attributes:
        stock: MergeKit's method X; this class only chooses its weights.
        provider: knows the whole models.
    """

    stock: GeneralizedTaskArithmeticMerge
    provider: Provider

    def merge_group(
        self, group: TensorGroup, /, *, models: Models | None = None, **parameters: Any
    ) -> Tensor:
        """Merge one tensor of the base and of each expert.

        Args:
            group: θ_0 and θ_t, of the same shape, dtype and device.
            models: what they are from, if that is known.
            parameters: those of the stock method, with the priors w_t as ``weight``;
                ``granularity``; and ``exponent``, k in λ_t ∝ w_t ‖τ_t‖^k.

        Returns:
            θ_0 + lambda Σ_t λ_t τ_t, with the task vectors τ_t sparsified by the stock
            method; a tensor of the group's shape and dtype.

        Raises:
            ValueError: if an input or the result is not finite, or if the granularity is
                ``layer`` and the tensor is not from the layer that its name says.
        """
        inputs = TensorInputs.of(group)
        base, scale = inputs.base, parameters["lambda"]
        if not inputs.experts or not base.numel():
            return base.clone()
        models = models or self.provider.models_of([inputs])
        parameters = {"granularity": "tensor", "exponent": None, **parameters}

        if GRANULARITIES[parameters["granularity"]].by_direction:
            merged = torch.empty_like(base, memory_format=torch.contiguous_format)
            found = by_directions(inputs, models, parameters, merged)
            norms, size = found.squared_norms, base.numel()
            note(Entry.of(inputs.name, inputs.ids, norms, size, parameters, found), models)
            return _require_finite(merged, inputs.name)

        # λ_t = w_t ‖τ_t‖^k / Σ_j w_j ‖τ_j‖^k, with norms over the scope that the granularity sets
        norms = models.squared_norms(inputs, parameters["granularity"])
        entry = Entry.of(inputs.name, inputs.ids, norms, base.numel(), parameters)
        note(entry, models)
        if not any(entry.coefficients):
            return base.clone()
        # θ_0 + s Σ_t λ_t τ_t
        if self.is_plain:
            merged = add_task_vectors(base, inputs.experts, entry.coefficients, scale)
            if 0 <= scale <= 1 and max(norms) < _LARGEST_SAFE_NORM:
                return merged  # finite, since it is between finite values
        else:
            weights = dict(zip(inputs.ids, entry.coefficients, strict=True))
            merged = merge_sparsified(self.stock, inputs, {**parameters, "weight": weights})
        return _require_finite(merged, inputs.name)

    @property
    def is_plain(self) -> bool:
        """Whether this is task arithmetic, without sparsification or sign consensus."""
        return self.stock.sparsification_method is None and self.stock.consensus_method is None

    @property
    def is_random(self) -> bool:
        """Whether the stock method draws random numbers."""
        random = {SparsificationMethod.random, SparsificationMethod.della_magprune}
        return self.stock.sparsification_method in random

    @cached_property
    def spec(self) -> MergeMethodSpec:  # type: ignore[override]
        """The stock method's spec, with priors as weights, a granularity and an exponent."""
        stock = self.stock.spec
        return replace(
            stock,
            name="metagpt" if self.is_plain else f"metagpt_{stock.name}",
            pretty_name="MetaGPT" if self.is_plain else f"MetaGPT with {stock.pretty_name}",
            reference_url="https://arxiv.org/abs/2406.11385",
            parameters=with_priors(stock.parameters, self.is_plain),
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the inputs as MergeKit does, and that their files are unchanged since planning.

        MergeKit first calls this when it plans, for a slice or for all tensors. Then
        ``group_name`` is a place in the config, or None. Later it calls this for each tensor.
        """
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name is None or _SLICE.search(group_name):
            WATCH.begin()
            self.provider.begin(input_ids, base_id)
        else:
            self.provider.require_unchanged(input_ids, base_id)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge groups as MergeKit does; ``merge_state_dicts`` passes whole models at once."""
        models = self.provider.models_of([TensorInputs.of(group) for group in groups])
        places = models.merged_as(parameters)
        once = sorted(set(places))
        found: tuple[Tensor, ...] = super()._execute(
            [groups[number] for number in once],
            [{**parameters[number], "models": models} for number in once],
            options,
            input_dtypes=[input_dtypes[number] for number in once],
            out_dtype=out_dtype,
        )
        if out_dtype in (torch.float16, torch.bfloat16):  # MergeKit has rounded again
            for number, tensor in zip(once, found, strict=True):
                _require_finite(tensor, groups[number].metadata.name)
        return tuple(found[once.index(place)] for place in places)


def by_directions(
    inputs: TensorInputs, models: Models, parameters: dict[str, Any], out: Tensor | None = None
) -> Directions:
    """Merge a tensor into ``out`` with a coefficient for every direction, or return figures only.

    Raises:
        ValueError: if an input is not finite.
    """
    priors = [parameters["weight"][expert] for expert in inputs.ids]
    name = models.twins.get(inputs.name or "", inputs.name)
    try:
        return merge_directions(
            inputs.base,
            inputs.experts,
            Rule(priors, exponent_of(parameters)),
            role=role_of(name, inputs.base.shape, models.shape_of),
            name=name,
            scale=parameters["lambda"],
            out=out,
        )
    except FloatingPointError as error:
        raise inputs.not_finite() from error


def _require_finite(merged: Tensor, name: str | None) -> Tensor:
    """Return a result, or refuse it if it overflows its dtype, as it can with finite inputs."""
    if merged.numel():
        least, most = merged.detach().aminmax()
        if not (least.isfinite() & most.isfinite()):
            raise ValueError(
                f"Merging tensor {name} overflows {merged.dtype}; set a wider dtype (dtype: "
                "float32 or out_dtype: bfloat16), or a smaller lambda."
            )
    return merged
