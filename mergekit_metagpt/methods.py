"""The merge methods that MergeKit sees, and their registration.

Every task-vector method X of MergeKit gets a counterpart whose per-expert ``weight`` is the
scaling coefficient λ_t of the MetaGPT paper: ``metagpt`` for plain task arithmetic,
``metagpt_X`` for the sparsified ones, which are MergeKit's own code.
"""

import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
import torch

# Submodules only: at registration the package `mergekit.merge_methods` is half imported.
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BatchOptions,
    GroupMergeMethod,
    MergeMethodSpec,
    TensorGroup,
)
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_metagpt import journal
from mergekit_metagpt.coefficients import scaling_coefficients
from mergekit_metagpt.parameters import with_priors
from mergekit_metagpt.random_streams import own_stream
from mergekit_metagpt.survey import (
    Granularity,
    Survey,
    measure,
    scoped_norms,
    split,
    survey_groups,
)
from mergekit_metagpt.task_vectors import add_task_vectors, working_dtype

if TYPE_CHECKING:
    from mergekit_metagpt.checkpoints import Checkpoints

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

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the inputs as MergeKit does; when it plans, also for changed files."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if _are_checkpoints(input_ids):
            from mergekit_metagpt.kept_surveys import forget_changed

            forget_changed(_checkpoints(input_ids, base_id))

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        # merge_state_dicts hands over all groups at once: the only moment to survey them.
        coarse = {p.get("granularity") for p in parameters} & {"layer", "model"}
        if (
            coarse
            and len(groups) > 1
            and not _are_checkpoints([entry.id for entry in groups[0].entries])
        ):
            survey = survey_groups(groups, input_dtypes)
            parameters = [{**p, "survey": survey} for p in parameters]
        merged: tuple[Tensor, ...] = super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )
        if out_dtype in (torch.float16, torch.bfloat16):  # rounded after merge_group
            for group, tensor in zip(groups, merged, strict=True):
                _require_finite(tensor, group)
        return merged

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        granularity: Granularity = "tensor",
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
        base, experts = split(group)
        if not experts or base.tensor.numel() == 0:
            return base.tensor.clone()
        name = group.metadata.name
        norms = scoped_norms(
            name, granularity, lambda: _measure(group), lambda: survey or _survey_of(group)
        )
        priors = parameters["weight"]
        coefficients = scaling_coefficients(norms, [priors[e.id] for e in experts], exponent)
        journal.note(name, granularity, [e.id for e in experts], norms, coefficients)
        if not any(coefficients):
            return base.tensor.clone()
        if self.is_plain:
            scale = parameters["lambda"]
            merged = add_task_vectors(
                base.tensor, [expert.tensor for expert in experts], coefficients, scale
            )
            if 0 <= scale <= 1 and max(norms) < _LARGEST_SAFE_NORM:
                return merged  # between finite values
        else:
            weights = {e.id: c for e, c in zip(experts, coefficients, strict=True)}
            merged = self._merge_sparsified(group, {**parameters, "weight": weights})
        _require_finite(merged, group)
        return merged

    def _merge_sparsified(self, group: TensorGroup, parameters: dict[str, Any]) -> Tensor:
        base, experts = split(group)
        if self.stock.sparsification_method == SparsificationMethod.della_magprune:
            _require_ranks(group, parameters["density"].values())
        # The stock method subtracts, scales and sums in the base's dtype and returns that.
        exact = replace(base, tensor=base.tensor.to(working_dtype(base.tensor.dtype)))
        stock_group = replace(group, entries=(exact, *experts))
        with own_stream(base.tensor.device, f"{self.stock.spec.name}/{group.metadata.name}"):
            merged: Tensor = self.stock.merge_group(stock_group, **parameters)
        return merged.to(base.tensor.dtype)


def _measure(group: TensorGroup) -> tuple[float, ...]:
    base, experts = split(group)
    return measure(group.metadata.name, (base.id, base.tensor), [(e.id, e.tensor) for e in experts])


def _are_checkpoints(ids: Iterable[Hashable]) -> bool:
    """Return whether the ids refer to models on disk, not to tensors in memory."""
    # Without the module there are no references, and importing it takes transformers along.
    common = sys.modules.get("mergekit.common")
    return common is not None and all(isinstance(id_, common.ModelReference) for id_ in ids)


def _checkpoints(ids: Iterable[Any], base: Any) -> "Checkpoints":
    from mergekit_metagpt.checkpoints import Checkpoints

    return Checkpoints.of(base, [id_ for id_ in ids if id_ != base])


def _survey_of(group: TensorGroup) -> Survey:
    base, _ = split(group)
    ids = [entry.id for entry in group.entries]
    if not _are_checkpoints(ids):
        return survey_groups([group])
    from mergekit_metagpt.kept_surveys import kept_survey

    return kept_survey(
        _checkpoints(ids, base.id),
        group.metadata.name,
        base.tensor.dtype,
        base.tensor.device,
        progress=not _quiet(),
    )


def _quiet() -> bool:
    """Return whether the command that runs was given ``--quiet``, which methods are not told."""
    command = click.get_current_context(silent=True)
    if command is None:
        return False
    options = command.params.get("merge_options")
    return bool(command.params.get("quiet", getattr(options, "quiet", False)))


def _require_ranks(group: TensorGroup, densities: Iterable[float]) -> None:
    """Refuse rows of one number: DELLA ranks the numbers of a row, and MergeKit divides by 0."""
    shape = group.tensors[0].shape
    row = shape[1] if len(shape) > 1 else shape.numel()
    if row == 1 and any(0 < density < 1 for density in densities):
        raise ValueError(
            f"DELLA cannot rank the numbers of tensor {group.metadata.name} of shape "
            f"{list(shape)}, one to a row; set its density to 1 with a filter, or choose a DARE "
            "method."
        )


def _require_finite(merged: Tensor, group: TensorGroup) -> None:
    """Refuse a result that left its dtype's range, which finite inputs allow."""
    if not merged.numel():
        return
    least, most = merged.detach().aminmax()
    if not (least.isfinite() & most.isfinite()):
        raise ValueError(
            f"Merging tensor {group.metadata.name} overflows {merged.dtype}; set a wider dtype "
            "(dtype: float32 or out_dtype: bfloat16), or a smaller lambda."
        )


def _task_vector_methods() -> list[GeneralizedTaskArithmeticMerge]:
    methods = registry.registered_methods()
    return [method for method in methods if isinstance(method, GeneralizedTaskArithmeticMerge)]


def register() -> None:
    """Register ``metagpt`` and every ``metagpt_X`` with MergeKit; once is enough.

    The start-up file of this package does this when MergeKit is imported. Call it yourself
    only where start-up files are not read: ``pip install --target``, ``python -S``.
    """
    known = {method.spec.name for method in registry.registered_methods()}
    for stock in _task_vector_methods():
        method = MetaGPTMerge(stock)
        if method.spec.name not in known:
            registry.register(method)


def evolvable_parameters() -> dict[str, list[str]]:
    """Return for each method the per-expert parameters that ``mergekit-evolve`` may search."""
    methods = [MetaGPTMerge(stock) for stock in _task_vector_methods()]
    return {m.spec.name: ["weight"] if m.is_plain else ["weight", "density"] for m in methods}
