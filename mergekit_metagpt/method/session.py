"""What MergeKit gives a merge method no argument for.

MergeKit calls a method with the tensors of one parameter at a time, for any merge of the
process and from any of its threads, and hands it nothing else: neither the models that they
come from, nor the options of the command, nor a place to leave a result. What outlives such a
call is therefore kept here, in :data:`SESSION`, one object for the process: the surveys that
its merges share, the journals that are kept of them, and the options that a survey needs.
"""

import logging
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt.advice import share, warnings
from mergekit_metagpt.measure.kept_surveys import KeptSurveys
from mergekit_metagpt.measure.survey import Survey, TensorInputs, survey_tensors
from mergekit_metagpt.summary import Entry, Summary

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)


class Session:
    """The state that the merges of one process share; for any number of threads.

    Attributes:
        surveys: what has been measured.
    """

    def __init__(self) -> None:
        self.surveys = KeptSurveys()
        self._journals: list[list[Entry]] = []
        self._logged: dict[Hashable, Entry] = {}
        self._loader_options: MergeOptions | None = None
        self._quiet = False

    def begin(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Prepare for a merge that MergeKit plans: note its options, and which files changed.

        Args:
            ids: of all inputs.
            base: the id of θ_0.
        """
        self._logged.clear()
        checkpoints = checkpoints_of(ids, base)
        if checkpoints is not None:
            self._note_options()
            self.surveys.begin(checkpoints)

    def require_unchanged(self, ids: Sequence[Hashable], base: Hashable) -> None:
        """Refuse to go on with a merge whose files change meanwhile; arguments as for ``begin``.

        Raises:
            ValueError: if a weight file is not the one that the merge began with.
        """
        checkpoints = checkpoints_of(ids, base)
        if checkpoints is not None:
            self.surveys.require_unchanged(checkpoints)

    def survey_of(self, inputs: TensorInputs) -> Survey:
        """Return the survey of the models that a tensor comes from, taken once.

        For tensors in memory, which belong to no model that could be read, that is a survey of
        this one alone.
        """
        checkpoints = checkpoints_of(inputs.ids, inputs.base_id)
        if checkpoints is None:
            return survey_tensors([inputs])
        self._set_up_loaders()
        device = inputs.base.device
        return self.surveys.survey_of(checkpoints, device, progress=not self._quiet)

    @contextmanager
    def journal(self) -> Iterator[list[Entry]]:
        """Collect an entry for each tensor that any thread of this process merges meanwhile."""
        entries: list[Entry] = []
        self._journals.append(entries)
        try:
            yield entries
        finally:
            self._journals[:] = [kept for kept in self._journals if kept is not entries]

    def note(self, entries: Iterable[Entry]) -> None:
        """Add entries, this process's or another's, to every journal that is kept now.

        Where none is kept, as under MergeKit's own commands, log them instead.
        """
        entries = list(entries)
        for journal in self._journals:
            journal.extend(entries)
        if not self._journals:
            self._log(entries)

    def _log(self, entries: Iterable[Entry]) -> None:
        """Log what a merge uses, once: at granularity ``model`` its first tensor tells.

        At the others MergeKit's last tensor would, but nothing says which one that is.
        """
        for entry in entries:
            merge = (entry.experts, entry.squared_norms, entry.exponent)
            if entry.granularity != "model" or not _are_models(entry.experts):
                continue
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

    def _note_options(self) -> None:
        """Keep the options of the thread that plans; those that merge know of none."""
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
        """Let this thread read models as the one that planned."""
        from mergekit.io.tasks import LoaderCache

        if self._loader_options is not None and not vars(LoaderCache()):
            LoaderCache().setup(self._loader_options)


SESSION = Session()


def checkpoints_of(ids: Sequence[Hashable], base: Hashable) -> "Checkpoints | None":
    """Return the models that ids refer to, or None where they are names of tensors in memory."""
    models: list[Any] = [base, *(id_ for id_ in ids if id_ != base)]
    if not _are_models(models):
        return None
    from mergekit_metagpt.measure.checkpoints import Checkpoints

    return Checkpoints.of(models[0], models[1:])


def _are_models(ids: Iterable[Hashable]) -> bool:
    """Return whether ids are references to models, not names of tensors in memory."""
    # Without the module there are no references, and importing it takes transformers along.
    common = sys.modules.get("mergekit.common")
    return common is not None and all(isinstance(id_, common.ModelReference) for id_ in ids)


def _is_quiet(command: click.Context) -> bool:
    """Return whether a command was given ``--quiet``."""
    options = command.params.get("merge_options")
    return bool(command.params.get("quiet", getattr(options, "quiet", False)))
