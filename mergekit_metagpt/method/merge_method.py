"""The merge methods that MergeKit sees, and their registration.

Every task-vector method X of MergeKit gets a counterpart. Its weight for each expert is the
scaling coefficient λ_t of the MetaGPT paper. ``metagpt`` is plain task arithmetic. Each
``metagpt_X`` is a sparsified method and follows MergeKit's X.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
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

from mergekit_metagpt.core.directions import Directions, Rule, merge_directions
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.core.roles import Role, ShapeOf, role_of
from mergekit_metagpt.core.task_vectors import add_task_vectors
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_tensors
from mergekit_metagpt.method.parameters import exponent_of, with_priors
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.session import SESSION, checkpoints_of
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

        SESSION.read_ahead(inputs)
        parameters |= {"granularity": granularity, "exponent": exponent}
        chosen, size = GRANULARITIES[granularity], inputs.base.numel()
        if chosen.has_matrices:
            merged = torch.empty_like(inputs.base, memory_format=torch.contiguous_format)
            shape_of = shapes.get if shapes else SESSION.shapes_beside(inputs)
            found = by_directions(inputs, shape_of, parameters, merged)
            norms = found.squared_norms
            SESSION.note([Entry.of(inputs.name, inputs.ids, norms, size, parameters, found)])
            return _require_finite(merged, inputs.name)
        norms = chosen.squared_norms(inputs, lambda: survey or SESSION.survey_of(inputs))
        entry = Entry.of(inputs.name, inputs.ids, norms, size, parameters)
        SESSION.note([entry])
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
        # merge_state_dicts passes all groups in one call. Only here are the models seen as a whole.
        once, places = list(range(len(groups))), list(range(len(groups)))
        if len(groups) > 1 and _are_in_memory(groups[0]):
            inputs = [TensorInputs.of(group) for group in groups]
            whole: dict[str, Any] = {"shapes": {it.name: it.base.shape for it in inputs}}
            if any(_needs_survey(p) for p in parameters):
                whole["survey"] = survey_tensors(inputs)
            once, places = _without_ties(inputs, parameters)
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


def _are_in_memory(group: TensorGroup) -> bool:
    """Return whether a group's ids name tensors in memory, not models."""
    ids = [entry.id for entry in group.entries]
    return checkpoints_of(ids, group.base and group.base.id) is None


def _without_ties(
    inputs: Sequence[TensorInputs], parameters: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return which tensors to merge, and for each tensor which of those results is its own.

    Tensors that are tied in memory stay tied. They are merged once: as the embedding, if one of
    them is.
    """
    shapes = {tensor.name: tensor.base.shape for tensor in inputs}
    tied: list[list[int]] = []
    groups: dict[Any, list[int]] = {}
    for number, (tensor, its) in enumerate(zip(inputs, parameters, strict=True)):
        group = groups.setdefault(tensor.memory, [])
        if not group or parameters[group[0]] != its:
            group = groups[tensor.memory] = []
            tied.append(group)
        group.append(number)

    def is_table(number: int) -> bool:
        return role_of(inputs[number].name, inputs[number].base.shape, shapes.get) is Role.ROWS

    once = [next(filter(is_table, group), group[0]) for group in tied]
    places = {number: place for place, group in enumerate(tied) for number in group}
    return once, [places[number] for number in range(len(inputs))]


def by_directions(
    inputs: TensorInputs,
    shape_of: ShapeOf,
    parameters: Mapping[str, Any],
    out: Tensor | None = None,
) -> Directions:
    """Merge a tensor with a coefficient for every direction.

    Args:
        inputs: θ_0 and θ_t.
        shape_of: returns the shape of another tensor of the base.
        parameters: those of the method, with the priors w_t as ``weight``.
        out: where the merge is written; None computes its figures only.

    Raises:
        ValueError: if an input is not finite.
    """
    role = role_of(inputs.name, inputs.base.shape, shape_of)
    priors = [parameters["weight"][expert] for expert in inputs.ids]
    rule = Rule(priors, exponent_of(parameters))
    try:
        return merge_directions(
            inputs.base,
            inputs.experts,
            rule,
            role=role,
            name=inputs.name,
            scale=parameters["lambda"],
            out=out,
        )
    except FloatingPointError as error:
        raise inputs.not_finite() from error


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


def _task_vector_methods() -> list[GeneralizedTaskArithmeticMerge]:
    methods = _registry().registered_methods()
    return [method for method in methods if isinstance(method, GeneralizedTaskArithmeticMerge)]


def _registry() -> Any:
    """Return MergeKit's registry: at each call, since it may be reloaded or imported anew."""
    return import_module("mergekit.merge_methods.registry")


def register() -> None:
    """Register ``metagpt`` and every ``metagpt_X`` with MergeKit. A second call changes nothing.

    The start-up file of this package calls this when MergeKit is imported. Call it yourself
    only where Python does not read start-up files: ``pip install --target``, ``python -S``.
    """
    registry = _registry()
    known = {method.spec.name for method in registry.registered_methods()}
    for stock in _task_vector_methods():
        method = MetaGPTMerge(stock)
        if method.spec.name not in known:
            registry.register(method)


def evolvable_parameters() -> dict[str, list[str]]:
    """Return, by method, the per-expert parameters that ``mergekit-evolve`` may search."""
    methods = [MetaGPTMerge(stock) for stock in _task_vector_methods()]
    return {m.spec.name: ["weight"] if m.is_plain else ["weight", "density"] for m in methods}
