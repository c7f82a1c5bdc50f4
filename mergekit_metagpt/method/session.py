"""State that MergeKit does not pass to a merge method.

MergeKit calls a method with the tensors of one parameter at a time, from any thread and for any
merge of the process. It passes no whole models, no options of the command, and no place to store
a result. :data:`SESSION`, one object per process, therefore keeps everything that outlives such
a call: the surveys that merges share, the open journals, and the options that a survey needs.
"""

import logging
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt.core.roles import ShapeOf
from mergekit_metagpt.measure.kept_surveys import KeptSurveys
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_tensors
from mergekit_metagpt.method.advice import share, warnings
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.method.watch import Watch

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)


class Session:
    """The state that the merges of one process share; thread-safe.

    Attributes:
        surveys: the surveys taken so far.
    """

    def __init__(self) -> None:
        self.surveys = KeptSurveys()
        self._journals: list[list[Entry]] = []
        self._logged: dict[Hashable, Entry] = {}
        self._checkpoints: Checkpoints | None = None
        self._watch: Watch | None = None
        self._lock = Lock()
        self._loader_options: MergeOptions | None = None
        self._quiet = False

    def begin(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Prepare for a merge that MergeKit plans: record its options and its files.

        Args:
            ids: the ids of all inputs.
            base: the id of θ_0.
        """
        self._logged.clear()
        self._watch = None
        checkpoints = self._checkpoints = checkpoints_of(ids, base)
        if checkpoints is not None:
            self._note_options()
            self.surveys.begin(checkpoints)

    def require_unchanged(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Stop a merge if a weight file has changed since it began; arguments as for ``begin``.

        Raises:
            ValueError: if a weight file has changed.
        """
        checkpoints = checkpoints_of(ids, base)
        if checkpoints is not None:
            self.surveys.require_unchanged(checkpoints)

    def read_ahead(self, inputs: TensorInputs) -> None:
        """Let the disk read the tensors of a merge, and what follows them in their files."""
        checkpoints = checkpoints_of(inputs.ids, inputs.base_id)
        if checkpoints is not None:
            self._set_up_loaders()
            for model in checkpoints.models:
                checkpoints.read_ahead(model, inputs.name)

    def shapes_beside(self, inputs: TensorInputs) -> ShapeOf:
        """Return what looks up the shapes of a base's other tensors."""
        checkpoints = checkpoints_of(inputs.ids, inputs.base_id)
        if checkpoints is None:
            return lambda tensor: None
        self._set_up_loaders()
        return checkpoints.shape_of_base

    def survey_of(self, inputs: TensorInputs) -> Survey:
        """Return the survey of the models that a tensor comes from; it is taken only once.

        If the tensor is in memory, there is no model to read. Then the survey covers this
        tensor only.
        """
        checkpoints = checkpoints_of(inputs.ids, inputs.base_id)
        if checkpoints is None:
            return survey_tensors([inputs])
        self._set_up_loaders()
        device = inputs.base.device
        return self.surveys.survey_of(checkpoints, device, progress=not self._quiet)

    @contextmanager
    def journal(self) -> Iterator[list[Entry]]:
        """Collect an entry for each tensor that this process merges, in any thread."""
        entries: list[Entry] = []
        self._journals.append(entries)
        try:
            yield entries
        finally:
            self._journals[:] = [kept for kept in self._journals if kept is not entries]

    def note(self, entries: Iterable[Entry]) -> None:
        """Add entries to every open journal. They may come from another process.

        If no journal is open, as under MergeKit's own commands, log them instead.
        """
        entries = list(entries)
        for journal in self._journals:
            journal.extend(entries)
        if not self._journals:
            self._log(entries)

    def _log(self, entries: Iterable[Entry]) -> None:
        """Warn of what the tensors of a merge show; at ``model``, log once what it uses.

        At the other granularities only the last tensor completes the coefficients, and MergeKit
        does not say which one is the last.
        """
        for entry in entries:
            if not _are_models(entry.experts):
                continue
            if entry.granularity != "model":
                self._look_at(entry)
                continue
            merge = (entry.experts, entry.squared_norms, entry.exponent)
            if self._logged.setdefault(merge, entry) is not entry:
                continue
            shares = zip(entry.experts, entry.coefficients, strict=True)
            LOG.info(
                "Scaling coefficients of %s, and of all tensors with its weights: %s",
                entry.tensor,
                ", ".join(f"{model} {share(coefficient)}" for model, coefficient in shares),
            )
            for sentence in warnings(Summary([entry])):
                LOG.warning("%s", sentence)

    def _look_at(self, entry: Entry) -> None:
        with self._lock:
            if self._watch is None and self._checkpoints is not None:
                self._watch = Watch(self._checkpoints.parameters_of_base())
            sentences = list(self._watch.add(entry)) if self._watch else []
        for sentence in sentences:
            LOG.warning("%s", sentence)

    def _note_options(self) -> None:
        """Keep the options of the planning thread; other threads do not have them."""
        from mergekit.io.tasks import LoaderCache
        from mergekit.options import MergeOptions

        command, cache = click.get_current_context(silent=True), LoaderCache()
        if command is None and not vars(cache):
            return
        self._quiet = command is not None and _is_quiet(command)
        self._loader_options = MergeOptions(
            transformers_cache=cache.hf_cache_dir,
            lora_merge_cache=cache.lora_cache_dir,
            lora_merge_dtype=cache.lora_merge_dtype,
            lazy_unpickle=cache.lazy_unpickle,
            trust_remote_code=cache.trust_remote_code,
        )

    def _set_up_loaders(self) -> None:
        """Give the loaders of this thread the options of the planning thread."""
        from mergekit.io.tasks import LoaderCache

        if self._loader_options is not None and not vars(LoaderCache()):
            LoaderCache().setup(self._loader_options)


SESSION = Session()


def checkpoints_of(ids: Sequence[Hashable], base: Hashable) -> "Checkpoints | None":
    """Return the models that ids refer to, or None if they name tensors in memory."""
    models: list[Any] = [base, *(id_ for id_ in ids if id_ != base)]
    if not _are_models(models):
        return None
    from mergekit_metagpt.measure.checkpoints import Checkpoints

    return Checkpoints.of(models[0], models[1:])


def _are_models(ids: Iterable[Hashable]) -> bool:
    """Return whether ids are references to models, not names of tensors in memory."""
    # If this module is not imported, no id is a reference. Its import is slow: it imports
    # transformers.
    common = sys.modules.get("mergekit.common")
    return common is not None and all(isinstance(id_, common.ModelReference) for id_ in ids)


def _is_quiet(command: click.Context) -> bool:
    """Return whether a command was given ``--quiet``."""
    options = command.params.get("merge_options")
    return bool(command.params.get("quiet", getattr(options, "quiet", False)))
