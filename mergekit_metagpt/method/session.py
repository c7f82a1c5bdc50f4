"""What MergeKit does not pass to a merge method.

MergeKit calls a method with the tensors of one parameter at a time, from any thread and for any
merge of the process. It passes no whole models and no options of the command. :data:`SESSION`
finds them, for one merge that MergeKit plans after another.
"""

import logging
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt.core.roles import ShapeOf
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_tensors
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.method.advice import share, warnings
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.method.watch import Watch

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.options import MergeOptions

    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)

_NOTED: ContextVar[list[Entry] | None] = ContextVar("noted", default=None)


@contextmanager
def noted(*, in_all_threads: bool = False) -> Iterator[list[Entry]]:
    """Collect an entry for each tensor that is merged within this context.

    Args:
        in_all_threads: also those merged by threads that have been started since, which
            inherit no context: those of MergeKit's multi-GPU executor.
    """
    entries: list[Entry] = []
    token = _NOTED.set(entries)
    if in_all_threads:
        SESSION.everywhere = entries
    try:
        yield entries
    finally:
        SESSION.everywhere = None
        _NOTED.reset(token)


class Session:
    """The merges of this process, one after another; thread-safe.

    Attributes:
        everywhere: where threads note entries that have no list of their own.
    """

    def __init__(self) -> None:
        self.everywhere: list[Entry] | None = None
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
            from mergekit_metagpt.measure.untold import warn_of_untold

            self._note_options()
            SURVEYS.begin(checkpoints)
            warn_of_untold(checkpoints)

    def require_unchanged(
        self, ids: Sequence[Hashable], base: Hashable, at_once: bool = False
    ) -> None:
        """Stop a merge if a weight file has changed since it began; arguments as for ``begin``.

        Raises:
            ValueError: if a weight file has changed.
        """
        checkpoints = checkpoints_of(ids, base)
        if checkpoints is not None:
            SURVEYS.require_unchanged(checkpoints, at_once)

    def read_ahead(self, group: "TensorGroup") -> None:
        """Let the disk read what follows the tensors of a merge in their files."""
        ids = [entry.id for entry in group.entries]
        checkpoints = checkpoints_of(ids, group.base and group.base.id)
        if checkpoints is not None:
            self._set_up_loaders()
            for model in checkpoints.models:
                checkpoints.read_ahead(model, group.metadata.name)

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
        return SURVEYS.survey_of(checkpoints, inputs.base.device, progress=not self._quiet)

    def note(self, entry: Entry) -> None:
        """Note how a tensor was merged; under MergeKit's own commands, log it instead."""
        entries = _NOTED.get()
        entries = self.everywhere if entries is None else entries
        if entries is None:
            self._log(entry)
        else:
            entries.append(entry)

    def _log(self, entry: Entry) -> None:
        """Warn of what the tensors of a merge show; at ``model``, log once what it uses.

        At the other granularities only the last tensor completes the coefficients, and MergeKit
        does not say which one is the last.
        """
        if not _are_models(entry.experts):
            return
        if entry.granularity != "model":
            self._look_at(entry)
            return
        merge = (entry.experts, entry.squared_norms, entry.exponent)
        if self._logged.setdefault(merge, entry) is not entry:
            return
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
