"""The merge methods that MergeKit sees.

The weight for each expert is the scaling coefficient λ_t of the MetaGPT paper. ``metagpt`` is plain
task arithmetic. Each ``metagpt_X`` is a sparsified method and follows MergeKit's X.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
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

from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.core.task_vectors import add_task_vectors
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_tensors
from mergekit_metagpt.method.directions import by_directions
from mergekit_metagpt.method.in_memory import are_in_memory, without_ties
from mergekit_metagpt.method.parameters import with_priors
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.sparsified import merge_sparsified
from mergekit_metagpt.method.summary import Entry

_PAPER = "https://arxiv.org/abs/2406.11385"

# The end of the name that MergeKit's planner gives to a slice of a config.
_SLICE = re.compile(r"\.slices\[\d+\]$")
# Task vectors with smaller squared norms cannot overflow float32.
_LARGEST_SAFE_NORM = 1e74


@dataclass(frozen=True)
class MetaGPTMerge(GroupMergeMethod):
    """A task-vector method of MergeKit with the closed-form coefficients of MetaGPT.

    Attributes:
        stock: MergeKit's method X; this class only chooses its weights.
    """

    stock: GeneralizedTaskArithmeticMerge

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
            reference_url=_PAPER,
            parameters=with_priors(stock.parameters, self.is_plain),
        )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        granularity: str = "tensor",
        exponent: float | None = None,
        survey: Survey | None = None,
        shapes: Mapping[str | None, Sequence[int]] | None = None,
        **parameters: Any,
    ) -> Tensor:
        """Merge one tensor of the base and of each expert.

        Args:
            group: θ_0 and θ_t, of the same shape, dtype and device.
            granularity: which tensors share coefficients: ``tensor``, ``layer`` or ``model``;
                or ``direction``.
            exponent: k in λ_t ∝ w_t ‖τ_t‖^k; that of the granularity, if None.
            survey: the squared norms of the whole models, if they are known already.
            shapes: the shapes of all tensors of the base, if they are known already.
            parameters: those of the stock method, with the priors w_t as ``weight``.

        Returns:
            θ_0 + lambda Σ_t λ_t τ_t, with the task vectors τ_t sparsified by the stock
            method; a tensor of the group's shape and dtype.

        Raises:
            ValueError: if an input or the result is not finite, or if the granularity is
                ``layer`` and the tensor is not from the layer that its name says.
        """
        inputs = TensorInputs.of(group)
        if not inputs.experts or not inputs.base.numel():
            return inputs.base.clone()

        parameters |= {"granularity": granularity, "exponent": exponent}
        chosen, size = GRANULARITIES[granularity], inputs.base.numel()
        if chosen.by_direction:
            merged = torch.empty_like(inputs.base, memory_format=torch.contiguous_format)
            shape_of = shapes.get if shapes else SESSION.shapes_beside(inputs)
            found = by_directions(inputs, shape_of, parameters, merged)
            norms = found.squared_norms
            SESSION.note(Entry.of(inputs.name, inputs.ids, norms, size, parameters, found))
            return _require_finite(merged, inputs.name)
        try:
            norms = chosen.squared_norms(inputs, lambda: survey or SESSION.survey_of(inputs))
        except ValueError:
            SESSION.require_unchanged(inputs.ids, inputs.base_id, at_once=True)  # else it is why
            raise
        entry = Entry.of(inputs.name, inputs.ids, norms, size, parameters)
        SESSION.note(entry)
        coefficients = entry.coefficients

        if not any(coefficients):
            return inputs.base.clone()
        if self.is_plain:
            scale = parameters["lambda"]
            merged = add_task_vectors(inputs.base, inputs.experts, coefficients, scale)
            if 0 <= scale <= 1 and max(norms) < _LARGEST_SAFE_NORM:
                return merged  # finite, since it is between finite values
        else:
            merged = self._merge_sparsified(inputs, coefficients, parameters)
        return _require_finite(merged, inputs.name)

    def _merge_sparsified(
        self,
        inputs: TensorInputs,
        coefficients: Sequence[float],
        parameters: dict[str, Any],
    ) -> Tensor:
        """Sparsify and add as the stock method, with the coefficients as its weights."""
        if self.stock.sparsification_method == SparsificationMethod.della_magprune:
            _require_ranks(inputs, parameters["density"].values())
        weights = dict(zip(inputs.ids, coefficients, strict=True))
        with own_stream(inputs.base.device, f"{self.stock.spec.name}/{inputs.name}"):
            return merge_sparsified(self.stock, inputs, {**parameters, "weight": weights})

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
            SESSION.begin(input_ids, base_id)
        else:
            SESSION.require_unchanged(input_ids, base_id)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge groups as MergeKit does; survey them first if they are in memory."""
        for group in groups:
            SESSION.read_ahead(group)
        # merge_state_dicts passes all groups in one call. Only here are the models seen as a whole.
        once, places = list(range(len(groups))), list(range(len(groups)))
        if len(groups) > 1 and are_in_memory(groups[0]):
            inputs = [TensorInputs.of(group) for group in groups]
            whole: dict[str, Any] = {"shapes": {it.name: it.base.shape for it in inputs}}
            if any(_needs_survey(p) for p in parameters):
                whole["survey"] = survey_tensors(inputs)
            once, places = without_ties(inputs, parameters)
            parameters = [{**p, **whole} for p in parameters]
        found: tuple[Tensor, ...] = super()._execute(
            [groups[n] for n in once],
            [parameters[n] for n in once],
            options,
            input_dtypes=[input_dtypes[n] for n in once],
            out_dtype=out_dtype,
        )
        merged = tuple(found[place] for place in places)
        if out_dtype in (torch.float16, torch.bfloat16):  # MergeKit has rounded again
            for group, tensor in zip(groups, merged, strict=True):
                _require_finite(tensor, group.metadata.name)
        return merged


def _needs_survey(parameters: dict[str, Any]) -> bool:
    return GRANULARITIES[parameters["granularity"]].needs_survey


def _require_ranks(inputs: TensorInputs, densities: Iterable[float]) -> None:
    """Refuse rows of one number, which DELLA cannot rank: MergeKit would divide by 0."""
    shape = inputs.base.shape
    row = shape[1] if len(shape) > 1 else shape.numel()
    if row == 1 and any(0 < density < 1 for density in densities):
        raise ValueError(
            f"DELLA cannot rank the numbers of tensor {inputs.name} of shape {list(shape)}: "
            "each row has only one; set its density to 1 with a filter, or choose a DARE method."
        )


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
