"""Surveys that the merges of one process share, and the files that they were taken of."""

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.workers import Mapper, in_this_process

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints, Device

# A merge looks at its files for each tensor; on a file server each look costs a round trip.
_SECONDS_BETWEEN_LOOKS = 1.0


# Inode, size in bytes and time of change in nanoseconds of a file by its path; None if it is gone.
FileStats = dict[str, tuple[int, int, int] | None]


def file_stats(paths: Iterable[str]) -> FileStats:
    """Return what tells whether files have changed."""
    return {path: _stat(path) for path in paths}


def changed_files(before: FileStats) -> list[str]:
    """Return the files that are not what they were."""
    return sorted(path for path, stat in before.items() if stat != _stat(path))


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass
class _Kept:
    files: FileStats
    looked: float
    survey: Survey | None = None


class KeptSurveys:
    """What is known of models while their files do not change; for any number of threads."""

    def __init__(self) -> None:
        self._kept: dict[Checkpoints, _Kept] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()

    def begin(self, checkpoints: "Checkpoints") -> None:
        """Prepare for a merge: forget what has changed since the last one, and open it anew."""
        with self._lock:
            for known, kept in list(self._kept.items()):
                if changed_files(kept.files):
                    del self._kept[known]
                    known.forget_files()
            self._keep(checkpoints)

    def require_unchanged(self, checkpoints: "Checkpoints", at_once: bool = False) -> None:
        """Refuse to go on with a merge of models that change meanwhile.

        Args:
            checkpoints: the models.
            at_once: look now; else only if the last look was a second ago.

        Raises:
            ValueError: if a weight file is not the one that the merge began with.
        """
        with self._lock:
            self._require_unchanged(checkpoints, at_once)

    def survey_of(
        self,
        checkpoints: "Checkpoints",
        device: "Device",
        progress: bool,
        mapper: Mapper = in_this_process,
    ) -> Survey:
        """Return the survey of the models, taking it only if it is not known yet.

        Threads that come while it is taken wait for it.

        Args:
            checkpoints: the models that are merged.
            device: where the arithmetic is done.
            progress: whether a progress bar is shown.
            mapper: who measures the models.

        Raises:
            ValueError: if a weight file has changed since the merge began, or the models
                cannot be compared.
        """
        with self._lock:
            kept = self._keep(checkpoints)
            if kept.survey is None:
                self._require_unchanged(checkpoints, at_once=True)
                # The merge holds tensors of the files it has open, which keep all pages that are
                # read through them in memory; those that the survey opens itself are let go one
                # by one.
                checkpoints.close_files()
                survey = checkpoints.survey(device, progress, mapper=mapper)
                self._require_unchanged(checkpoints, at_once=True)
                kept.survey = survey
            return kept.survey

    def share(self, models: Iterable["Checkpoints"]) -> "dict[Checkpoints, Survey]":
        """Return what is known of these models, for processes that merge them too."""
        with self._lock:
            kept = {checkpoints: self._kept[checkpoints].survey for checkpoints in models}
        return {checkpoints: survey for checkpoints, survey in kept.items() if survey}

    def adopt(self, shared: "dict[Checkpoints, Survey]") -> None:
        """Keep what another process has measured in the files that are here now."""
        with self._lock:
            for checkpoints, survey in shared.items():
                self._kept.pop(checkpoints, None)
                self._keep(checkpoints).survey = survey

    def _keep(self, checkpoints: "Checkpoints") -> _Kept:
        kept = self._kept.get(checkpoints)
        if kept is None:
            kept = _Kept(file_stats(checkpoints.files()), time.monotonic())
            self._kept[checkpoints] = kept
        return kept

    def _require_unchanged(self, checkpoints: "Checkpoints", at_once: bool) -> None:
        kept, now = self._keep(checkpoints), time.monotonic()
        if not at_once and now - kept.looked < _SECONDS_BETWEEN_LOOKS:
            return
        kept.looked = now
        changed = changed_files(kept.files)
        if changed:
            raise ValueError(
                f"Weight file {changed[0]} has changed since this merge began, which would "
                "mix two models; merge again when nobody writes to it."
            )
