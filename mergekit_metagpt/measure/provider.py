"""What MergeKit does not pass to a merge method: whole models, and the options of the command.

MergeKit calls a method with the tensors of one parameter at a time, from any thread and for any
merge of the process. :data:`PROVIDER` finds the models that they are from.
"""

import math
import re
import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
import torch

from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.granularities import GRANULARITIES, moved
from mergekit_metagpt.core.inputs import TensorInputs, place_of
from mergekit_metagpt.core.roles import is_head, is_table
from mergekit_metagpt.measure.survey import Measured, Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.names import canonical, grouped, layer_of

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints


class Provider:
    """The models of the merges of this process, one merge after another; thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Checkpoints, StoredModels] = {}
        self._loading: dict[str, Any] = {}
        self.quiet = False

    def begin(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Prepare for a merge that MergeKit plans: record its options and its files."""
        self._known.clear()
        checkpoints = _checkpoints_of(ids, base)
        if checkpoints is None:
            return
        command, loading = click.get_current_context(silent=True), dict(_loading())
        if command or loading:
            given = command.params if command else {}
            self.quiet = bool(given.get("quiet", getattr(given.get("merge_options"), "quiet", 0)))
            self._loading = loading
        SURVEYS.begin(checkpoints)

    def require_unchanged(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Stop a merge if a weight file has changed since it began."""
        checkpoints = _checkpoints_of(ids, base)
        if checkpoints is not None:
            SURVEYS.require_unchanged(checkpoints)

    def models_of(self, tensors: Sequence[TensorInputs]) -> "StoredModels | ModelsInMemory":
        """Return the models that tensors with the same ids are from."""
        checkpoints = _checkpoints_of(tensors[0].ids, tensors[0].base_id) if tensors else None
        if checkpoints is None:
            return ModelsInMemory(tensors)
        if not _loading():  # only the planning thread has the options of the command
            _loading().update(self._loading)
        return self._known.setdefault(checkpoints, StoredModels(checkpoints, self.quiet))


@dataclass(frozen=True)
class StoredModels:
    """A base and experts that MergeKit reads from weight files."""

    checkpoints: "Checkpoints"
    quiet: bool  # shows no progress bar

    def merged_as(self, parameters: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the number of each tensor: each is merged by itself."""
        return list(range(len(parameters)))

    def shape_of(self, tensor: str) -> Sequence[int] | None:
        """Return the shape of a tensor of the base, or None if it has none, or only as a twin."""
        if is_head(tensor) and tensor in self.twins:
            return None
        # A merge may have more layers than the base; then a tensor is like that of the first layer.
        like = re.sub(r"(?<=\.)\d+(?=\.)", "0", tensor, count=1)
        headers = self.checkpoints.headers
        header = headers.get(tensor) or headers.get(like)
        return header.shape if header else None

    @cached_property
    def twins(self) -> dict[str, str]:
        """The heads that are stored beside the embeddings that they are, and these."""
        checkpoints, weights = self.checkpoints, self.checkpoints.weights
        indices = [checkpoints.loader(model).index for model in checkpoints.models]
        heads = [it for it in weights if any(it in index.tensor_paths for index in indices)]
        return _twins(
            heads if checkpoints.is_tied else (),
            weights,
            lambda head, table: checkpoints.are_equal(weights[head], weights[table]),
        )

    @cached_property
    def parameters(self) -> int | None:
        """How many numbers the base holds."""
        return sum(math.prod(header.shape) for header in self.checkpoints.headers.values())

    def squared_norms(self, tensor: TensorInputs, granularity: str) -> Norms:
        """Return ‖τ_t‖² over a tensor's scope, T floats; the models are surveyed only once.

        Raises:
            ValueError: if the tensor holds NaN or Inf, if the granularity is ``layer`` and it is
                not from the layer that its name says, or if a weight file has changed.
        """
        try:
            if not GRANULARITIES[granularity].needs_survey:
                return tensor.squared_norms
            # First, to save memory: the tensor's own norms need buffers, too.
            survey = SURVEYS.survey_of(
                self.checkpoints, tensor.base.device, progress=not self.quiet
            )
            if GRANULARITIES[granularity].keeps_layers and layer_of(tensor.name):
                self._require_own_layer(tensor)
            return survey.norms_of(tensor, granularity)
        except ValueError:
            SURVEYS.require_unchanged(self.checkpoints, at_once=True)  # else it is why
            raise

    def _require_own_layer(self, inputs: TensorInputs) -> None:
        """Refuse tensors that slices have moved; MergeKit passes only the name in the output."""
        models: Any = inputs
        weight = self.checkpoints.weights.get(inputs.name or "")
        for model, tensor in models:
            stored = self.checkpoints.load(model, weight, "cpu") if weight else None
            # What was not converted is the same place of a mapped file, and need not be read.
            if stored is None or not (
                place_of(stored) == place_of(tensor) or torch.equal(stored.to(tensor), tensor)
            ):
                raise moved(inputs.name)


@dataclass(frozen=True)
class ModelsInMemory:
    """Models that are in memory; MergeKit's ``merge_state_dicts`` passes them as a whole."""

    tensors: Sequence[TensorInputs]
    parameters = None  # nothing is said of them

    def shape_of(self, tensor: str) -> Sequence[int] | None:
        """Return the shape of a tensor, or None if there is none, or only as a twin."""
        stored = self._stored.get(tensor)
        return stored.base.shape if stored and tensor not in self.twins else None

    @cached_property
    def twins(self) -> dict[str, str]:
        """The heads that are stored beside the embeddings that they are, and these."""

        def are_equal(*names: str) -> bool:
            pairs = zip(*(self._stored[name] for name in names), strict=True)
            return all(torch.equal(head, table.to(head.device)) for (_, head), (_, table) in pairs)

        return _twins(self._stored, self._stored, are_equal)

    def squared_norms(self, tensor: TensorInputs, granularity: str) -> Norms:
        """Return ‖τ_t‖² over a tensor's scope, T floats.

        Raises:
            ValueError: if a tensor holds NaN or Inf.
        """
        if not GRANULARITIES[granularity].needs_survey:
            return tensor.squared_norms
        return self._survey.norms_of(tensor, granularity)

    def merged_as(self, parameters: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return for each tensor the number of the one whose merge is also its own.

        Tensors that are tied in memory stay tied: they are merged once, as the embedding if one
        of them is.
        """
        tied = (self._alike[tensor.memory] for tensor in self.tensors)
        return [
            next(number for number in numbers if parameters[number] == own)
            for numbers, own in zip(tied, parameters, strict=True)
        ]

    @cached_property
    def _alike(self) -> dict[tuple[Any, ...], list[int]]:
        """The numbers of the tensors that lie in one place, a table first."""
        alike = grouped((tensor.memory, number) for number, tensor in enumerate(self.tensors))
        return {
            place: sorted(numbers, key=lambda number: not is_table(self.tensors[number].name))
            for place, numbers in alike.items()
        }

    @cached_property
    def _names(self) -> list[str]:
        return [tensor.name or f"#{number}" for number, tensor in enumerate(self.tensors)]

    @cached_property
    def _stored(self) -> dict[str, TensorInputs]:
        """The tensors that would be in a file, where tied ones are stored once."""
        return {self._names[first]: self.tensors[first] for first, *_ in self._alike.values()}

    @cached_property
    def _survey(self) -> Survey:
        names, alike = self._names, self._alike.values()
        tied = {names[number]: names[first] for first, *others in alike for number in others}
        measured = {name: Measured.of(it) for name, it in self._stored.items()}
        return Survey(self.tensors[0].ids, measured, tied)


def _twins(
    stored: Collection[str], names: Collection[str], are_equal: Callable[[str, str], bool]
) -> dict[str, str]:
    # Of several equal tables the first by name, whatever order a file has them in.
    tables = sorted(filter(is_table, names))
    pairs = (
        (it, next((t for t in tables if are_equal(it, t)), "")) for it in filter(is_head, stored)
    )
    return {head: table for head, table in pairs if table}


PROVIDER = Provider()


def _loading() -> dict[str, Any]:
    """Return the options of MergeKit's loaders, which each thread has for itself."""
    from mergekit.io.tasks import LoaderCache

    return vars(LoaderCache())


def _checkpoints_of(ids: Sequence[Hashable], base: Hashable) -> "Checkpoints | None":
    """Return the models that ids refer to, or None if they name tensors in memory."""
    # If this module is not imported, no id is a reference. Its import is slow: it imports
    # transformers.
    common = sys.modules.get("mergekit.common")
    models: list[Any] = [base, *(id_ for id_ in canonical(ids) if id_ != base)]
    if common is None or not all(isinstance(id_, common.ModelReference) for id_ in models):
        return None
    from mergekit_metagpt.measure.checkpoints import Checkpoints

    return Checkpoints(models[0], tuple(models[1:]))
