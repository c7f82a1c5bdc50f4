"""How each tensor was merged: noted for this package's commands, looked at under MergeKit's own."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Lock

from mergekit_metagpt.method.advice import concerns, share, warnings
from mergekit_metagpt.method.provider import Models
from mergekit_metagpt.method.summary import Entry, Summary

LOG = logging.getLogger(__name__)

# What shows in tensors with this part of the parameters is worth a warning.
_PART = 0.1

# Where this package's jobs note entries, one job at a time. MergeKit merges in threads, too.
_NOTED: list[list[Entry]] = []


@contextmanager
def noted() -> Iterator[list[Entry]]:
    """Collect an entry for each tensor that any thread merges within this context."""
    _NOTED.append([])
    try:
        yield _NOTED[-1]
    finally:
        _NOTED.pop()


def note(entry: Entry, models: Models) -> None:
    """Note how a tensor was merged; if nobody collects the entries, look at it and warn."""
    if _NOTED:
        _NOTED[-1].append(entry)
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
