"""How each tensor was merged: noted for this package's commands, looked at under MergeKit's own."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

from mergekit_metagpt.method.advice import concerns, share, warnings
from mergekit_metagpt.method.provider import Models
from mergekit_metagpt.method.summary import Entry, Summary

LOG = logging.getLogger(__name__)

# What shows in tensors with this part of the parameters is worth a warning.
_PART = 0.1

_NOTED: ContextVar[list[Entry] | None] = ContextVar("noted", default=None)
# Where threads note entries that have no list of their own.
_EVERYWHERE: list[list[Entry]] = []


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
        _EVERYWHERE.append(entries)
    try:
        yield entries
    finally:
        _EVERYWHERE[:] = [others for others in _EVERYWHERE if others is not entries]
        _NOTED.reset(token)


def note(entry: Entry, models: Models) -> None:
    """Note how a tensor was merged; if nobody collects the entries, look at it and warn."""
    entries = _NOTED.get()
    if entries is None and _EVERYWHERE:
        entries = _EVERYWHERE[-1]
    if entries is not None:
        entries.append(entry)
    elif size := models.parameters:
        WATCH.look_at(entry, _PART * size)


class Watch:
    """Looks at the tensors of one merge as they are merged, and warns once of each thing.

    At granularity ``model`` any tensor shows the whole merge. At the others only the last one
    does, and MergeKit does not say which one that is.
    """

    def __init__(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._lock = Lock()

    def begin(self) -> None:
        """Forget the merge before."""
        self._seen.clear()

    def look_at(self, entry: Entry, enough: float) -> None:
        """Log what has now been seen in tensors with enough parameters."""
        if entry.granularity == "model":
            self._look_at_whole(entry)
            return
        for about, sentence in concerns(Summary([entry])):
            if self._is_enough(about, entry.size, enough):
                LOG.warning(
                    "In tensors with at least a tenth of the parameters, as in %s: %s",
                    entry.tensor,
                    sentence,
                )

    def _look_at_whole(self, entry: Entry) -> None:
        if not self._is_enough((entry.experts, entry.squared_norms, entry.exponent), 1, 1):
            return
        shares = zip(entry.experts, entry.coefficients, strict=True)
        LOG.info(
            "Scaling coefficients of %s, and of all tensors with its weights: %s",
            entry.tensor,
            ", ".join(f"{model} {share(coefficient)}" for model, coefficient in shares),
        )
        for sentence in warnings(Summary([entry])):
            LOG.warning("%s", sentence)

    def _is_enough(self, what: Hashable, size: int, enough: float) -> bool:
        """Return whether a thing has been seen often enough by now, and was not before."""
        with self._lock:
            before = self._seen[what]
            self._seen[what] += size
            return before < enough <= self._seen[what]


WATCH = Watch()
