"""The merge methods that MergeKit sees, and their registration.

Every task-vector method X of MergeKit gets a counterpart whose per-expert ``weight`` is the
scaling coefficient λ_t of the MetaGPT paper: ``metagpt`` for plain task arithmetic,
``metagpt_X`` for the sparsified ones, which are MergeKit's own code.
"""

from collections.abc import Hashable, Iterable, Sequence
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

from mergekit_metagpt.coefficients import scaling_coefficients
from mergekit_metagpt.granularities import GRANULARITIES
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_groups
from mergekit_metagpt.method.parameters import with_priors
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.session import SESSION, Entry, checkpoints_of
from mergekit_metagpt.task_vectors import add_task_vectors, working_dtype

_PAPER = "https://arxiv.org/abs/2406.11385"

# The square of a length whose differences cannot overflow float32.
_LARGEST_SAFE_NORM = 1e74


@dataclass(frozen=True)
class MetaGPTMerge(GroupMergeMethod):
    """A task-vector method of MergeKit, weighted by the closed form of MetaGPT.

    Attributes:
        stock: the method X of MergeKit that does everything but choose the weights.
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
        """The stock method's spec with priors for weights, a granularity and an exponent."""
        stock = self.stock.spec
        return replace(
            stock,
            name="metagpt" if self.is_plain else f"metagpt_{stock.name}",
            pretty_name="MetaGPT" if self.is_plain else f"MetaGPT with {stock.pretty_name}",
            reference_url=_PAPER,
            parameters=with_priors(stock.parameters),
        )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        granularity: str = "tensor",
        exponent: float = 2.0,
        survey: Survey | None = None,
        **parameters: Any,
    ) -> Tensor:
        """Merge one tensor of the base and of each expert.

        Args:
            group: θ_0 and θ_t, of one shape, dtype and device.
            granularity: the scope that a coefficient is shared over.
            exponent: k in λ_t ∝ w_t ‖τ_t‖^k.
            survey: the squared norms of the whole models, if they are known.
            parameters: all of the stock method's, with the priors w_t as ``weight``.

        Returns:
            θ_0 + lambda Σ_t λ_t τ_t, the task vectors τ_t sparsified as the stock method
            does; a tensor of the group's shape and dtype.

        Raises:
            ValueError: if an input or the result is not finite, or ``layer`` is asked for
                and this tensor is another layer's than its name says.
        """
        inputs = TensorInputs.of(group)
        if not inputs.experts or not inputs.base.numel():
            return inputs.base.clone()

        norms = GRANULARITIES[granularity].squared_norms(
            inputs, lambda: survey or SESSION.survey_of(inputs)
        )
        priors = [parameters["weight"][expert] for expert in inputs.ids]
        coefficients = scaling_coefficients(norms, priors, exponent)
        SESSION.note([Entry(inputs.name, granularity, inputs.ids, norms, tuple(coefficients))])

        if not any(coefficients):
            return inputs.base.clone()
        if self.is_plain:
            scale = parameters["lambda"]
            merged = add_task_vectors(inputs.base, inputs.experts, coefficients, scale)
            if 0 <= scale <= 1 and max(norms) < _LARGEST_SAFE_NORM:
                return merged  # between finite values
        else:
            merged = self._merge_sparsified(inputs, group, coefficients, parameters)
        return _require_finite(merged, inputs.name)

    def _merge_sparsified(
        self,
        inputs: TensorInputs,
        group: TensorGroup,
        coefficients: Sequence[float],
        parameters: dict[str, Any],
    ) -> Tensor:
        """Let the stock method sparsify and add up, with the coefficients for its weights."""
        base = inputs.base
        if self.stock.sparsification_method == SparsificationMethod.della_magprune:
            _require_ranks(inputs, parameters["density"].values())
        # The stock method subtracts, scales and sums in the base's dtype and returns that.
        exact = base.to(working_dtype(base.dtype))
        canonical_group = TensorGroup.from_tensors(
            [exact, *inputs.experts],
            ids=[inputs.base_id, *inputs.ids],
            base_index=0,
            name=inputs.name,
            vocabulary_axis=group.metadata.vocabulary_axis,
        )
        weights = dict(zip(inputs.ids, coefficients, strict=True))
        with own_stream(base.device, f"{self.stock.spec.name}/{inputs.name}"):
            merged: Tensor = self.stock.merge_group(
                canonical_group, **{**parameters, "weight": weights}
            )
        return merged.to(base.dtype)

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the inputs as MergeKit does; it asks when it plans and when it merges."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        SESSION.plan(input_ids, base_id)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Merge groups as MergeKit does, having surveyed those that are in memory."""
        # merge_state_dicts hands over all groups at once: the only moment to survey them.
        if len(groups) > 1 and any(_needs_survey(p) for p in parameters):
            ids = [entry.id for entry in groups[0].entries]
            if checkpoints_of(ids, groups[0].base and groups[0].base.id) is None:
                survey = survey_groups(groups, input_dtypes)
                parameters = [{**p, "survey": survey} for p in parameters]
        merged: tuple[Tensor, ...] = super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )
        if out_dtype in (torch.float16, torch.bfloat16):  # rounded after merge_group
            for group, tensor in zip(groups, merged, strict=True):
                _require_finite(tensor, group.metadata.name)
        return merged


def _needs_survey(parameters: dict[str, Any]) -> bool:
    return GRANULARITIES[parameters["granularity"]].needs_survey


def _require_ranks(inputs: TensorInputs, densities: Iterable[float]) -> None:
    """Refuse rows of one number: DELLA ranks the numbers of a row, and MergeKit divides by 0."""
    shape = inputs.base.shape
    row = shape[1] if len(shape) > 1 else shape.numel()
    if row == 1 and any(0 < density < 1 for density in densities):
        raise ValueError(
            f"DELLA cannot rank the numbers of tensor {inputs.name} of shape {list(shape)}, one "
            "to a row; set its density to 1 with a filter, or choose a DARE method."
        )


def _require_finite(merged: Tensor, name: str | None) -> Tensor:
    """Return a result, or refuse it where it left its dtype's range, as finite inputs can."""
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
    """Register ``metagpt`` and every ``metagpt_X`` with MergeKit; once is enough.

    The start-up file of this package does this when MergeKit is imported. Call it yourself
    only where start-up files are not read: ``pip install --target``, ``python -S``.
    """
    registry = _registry()
    known = {method.spec.name for method in registry.registered_methods()}
    for stock in _task_vector_methods():
        method = MetaGPTMerge(stock)
        if method.spec.name not in known:
            registry.register(method)


def evolvable_parameters() -> dict[str, list[str]]:
    """Return for each method the per-expert parameters that ``mergekit-evolve`` may search."""
    methods = [MetaGPTMerge(stock) for stock in _task_vector_methods()]
    return {m.spec.name: ["weight"] if m.is_plain else ["weight", "density"] for m in methods}
