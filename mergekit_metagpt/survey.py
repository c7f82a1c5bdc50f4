"""Surveys: the squared norms of whole models' task vectors, measured tensor by tensor.

A survey streams checkpoints through MergeKit's own loaders, holds one tensor of the base and
of each expert at a time, and keeps T floats per tensor.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from mergekit_metagpt.task_vectors import squared_norms

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.merge_methods.base import TensorEntry, TensorGroup

Granularity = Literal["tensor", "layer", "model"]
Norms = tuple[float, ...]
Id = TypeVar("Id", bound=Hashable)

# Recomputed norms differ from surveyed ones by rounding only.
_SAME_NORM = 1e-5

_LAYER = re.compile(r"(?:^|\.)\d+(?=\.)")


def layer_of(tensor: str | None) -> str | None:
    """Return the layer that a tensor belongs to, or None outside of any layer.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight")
    'model.layers.3'
    >>> layer_of("model.embed_tokens.weight")
    """
    found = _LAYER.search(tensor or "")
    return found.string[: found.end()] if found else None


def canonical(ids: Iterable[Id]) -> list[Id]:
    """Return the ids in the one order that does not depend on how a config lists them."""
    return sorted(ids, key=lambda id_: (str(id_), type(id_).__name__))


@dataclass(frozen=True)
class Survey:
    """The squared norms ‖θ_t − θ_0‖² of T experts' task vectors, per tensor.

    Attributes:
        experts: T model ids, in canonical order.
        squared_norms: for each tensor name T floats, in the order of ``experts``. A tensor
            that is tied to another stands here once.
        dtypes: for each tensor name the dtype that base and experts promote to as stored.
        left_out: vocabulary tensors that could not be compared.
        parameters: how many elements were measured.
        products: the T x T inner products ⟨τ_i, τ_j⟩ over the whole model, if asked for.
    """

    experts: tuple[Hashable, ...]
    squared_norms: Mapping[str, Norms]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    parameters: int = 0
    products: tuple[Norms, ...] | None = None

    @cached_property
    def model(self) -> Norms:
        """T floats: the squared norms over the whole model, as in Theorem 10."""
        return self._sum(self.squared_norms)

    @cached_property
    def layers(self) -> dict[str, Norms]:
        """For each layer T floats; tensors outside of the layers are not in it."""
        members: dict[str, list[str]] = {}
        for name in self.squared_norms:
            if (layer := layer_of(name)) is not None:
                members.setdefault(layer, []).append(name)
        return {layer: self._sum(names) for layer, names in members.items()}

    @property
    def cosines(self) -> list[list[float]]:
        """T x T cosines of the task vectors (Property 6: 0 where i ≠ j); of a zero vector 0.

        Raises:
            ValueError: if the survey was taken without inner products.
        """
        if self.products is None:
            raise ValueError("This survey holds no inner products; take it with products=True.")
        lengths = [math.sqrt(row[t]) for t, row in enumerate(self.products)]
        return [
            [value / (a * b) if a * b else 0.0 for value, b in zip(row, lengths, strict=True)]
            for row, a in zip(self.products, lengths, strict=True)
        ]

    def _sum(self, names: Iterable[str]) -> Norms:
        rows = [self.squared_norms[name] for name in names]
        # fsum is exact, so that the order of the tensors does not matter.
        return tuple(math.fsum(row[t] for row in rows) for t in range(len(self.experts)))


def sum_matrices(matrices: Sequence[Sequence[Sequence[float]]]) -> tuple[Norms, ...]:
    """Add up matrices of one shape, exactly rounded."""
    return tuple(
        tuple(map(math.fsum, zip(*rows, strict=True))) for rows in zip(*matrices, strict=True)
    )


def measure(
    name: str | None,
    base: tuple[Hashable, Tensor],
    experts: Sequence[tuple[Hashable, Tensor]],
) -> Norms:
    """Return ‖θ_t − θ_0‖² of one tensor, T floats, all finite.

    Raises:
        ValueError: if an input holds NaN or Inf; names the model and the tensor.
    """
    norms = squared_norms(base[1], [tensor for _, tensor in experts])
    if not all(map(math.isfinite, norms)):
        for model, tensor in (base, *experts):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"Tensor {name} of model {model} holds NaN or Inf in {tensor.dtype}; repair or "
                    "replace that checkpoint, leave the model out of the merge, or, if its "
                    "numbers are only too large for the config's dtype, set a wider one."
                )
        raise ValueError(
            f"The task vectors of tensor {name} are too large to be squared in float64; "
            f"check the values of {', '.join(str(model) for model, _ in (base, *experts))}."
        )
    return tuple(norms)


def scoped_norms(
    tensor: str | None,
    granularity: Granularity,
    own: Callable[[], Norms],
    survey: Callable[[], Survey],
) -> Norms:
    """Return T squared norms over the scope that a tensor's coefficients are shared over.

    Args:
        tensor: the name of the merged tensor.
        granularity: ``tensor``, ``layer`` (tensors outside of any layer have a scope of
            their own) or ``model``.
        own: measures the tensors that are merged; called unless the survey has done so.
        survey: the survey of the whole models; called unless the granularity is ``tensor``.

    Raises:
        ValueError: if ``layer`` is asked for and the tensors that are merged are not those
            that the survey knows by this name.
    """
    if granularity == "tensor":
        return own()
    whole = survey()  # first of all: the earlier in a merge, the less memory that holds
    if granularity == "model":
        if tensor not in whole.squared_norms:
            own()  # nobody has looked for NaN and Inf in it yet
        return whole.model
    norms = own()
    layer = layer_of(tensor)
    if layer is None:
        return norms
    surveyed = whole.squared_norms.get(tensor or "")
    if surveyed is None or not all(
        math.isclose(a, b, rel_tol=_SAME_NORM) for a, b in zip(norms, surveyed, strict=True)
    ):
        raise ValueError(
            f"Granularity layer cannot choose the coefficients of {tensor}: the slices of this "
            f"merge put tensors of another layer there than {tensor} of the base. Use "
            "granularity: tensor or granularity: model."
        )
    return whole.layers[layer]


def survey_groups(
    groups: Sequence["TensorGroup"], dtypes: Sequence[torch.dtype | None] | None = None
) -> Survey:
    """Survey tensors in memory, as MergeKit's ``merge_state_dicts`` holds them.

    Args:
        groups: one MergeKit ``TensorGroup`` per parameter, all with the same base and
            experts. Parameters that share their memory are tied and count once.
        dtypes: for each group what its tensors are cast to first; as they are if not given.

    Returns:
        The survey, with unnamed groups numbered.

    Raises:
        ValueError: if a tensor holds NaN or Inf, or a group has no base.
    """
    experts: tuple[Hashable, ...] = ()
    norms: dict[str, Norms] = {}
    seen = set()
    for number, (group, dtype) in enumerate(
        zip(groups, dtypes or [None] * len(groups), strict=True)
    ):
        name = group.metadata.name or f"#{number}"
        base, others = split(group)
        experts = tuple(entry.id for entry in others)
        memory = tuple(
            (e.tensor.data_ptr(), e.tensor.shape, e.tensor.stride()) for e in (base, *others)
        )
        if base.tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        norms[name] = measure(
            name,
            (base.id, base.tensor.to(dtype or base.tensor.dtype)),
            [(e.id, e.tensor.to(dtype or e.tensor.dtype)) for e in others],
        )
    return Survey(experts, norms)


def split(group: "TensorGroup") -> tuple["TensorEntry", list["TensorEntry"]]:
    """Return a group's base and its experts in canonical order.

    Raises:
        ValueError: if the group has no base.
    """
    if group.base is None:
        raise ValueError(f"Tensor {group.metadata.name} has no base; set base_model.")
    entries: dict[Hashable, TensorEntry] = {entry.id: entry for entry in group.non_base}
    return group.base, [entries[id_] for id_ in canonical(entries)]


def survey_checkpoints(
    base: "ModelReference | str",
    experts: Sequence["ModelReference | str"],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    products: bool = False,
) -> Survey:
    """Survey checkpoints on disk or on the Hugging Face hub.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it (``model``, ``model@revision``,
            ``model+lora``), a ``ModelReference``, or one file of tensors.
        experts: θ_t, T of the same.
        dtype: what tensors are cast to before they are subtracted, as MergeKit's ``dtype``
            does; as stored when not given.
        device: where the arithmetic is done.
        progress: whether a progress bar is shown.
        products: whether inner products are measured too.

    Returns:
        The survey. Vocabulary tensors whose shapes or tokenizers differ are left out of it.

    Raises:
        ValueError: if an expert lacks a tensor of the base or holds another shape, or a
            tensor holds NaN or Inf; names the model and the tensor.
    """
    # Not at the top: MergeKit itself is only half imported when this module is.
    from mergekit_metagpt.checkpoints import Checkpoints

    return Checkpoints.of(base, experts).survey(dtype, device, progress, products)
