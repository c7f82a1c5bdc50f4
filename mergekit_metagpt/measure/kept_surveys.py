"""Surveys that the merges of one process share, and checks that their files are unchanged."""

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, in_this_process

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints
    from mergekit_metagpt.measure.tensors import Device

# A merge checks its files at each tensor. On a file server, each check costs a round trip.
_SECONDS_BETWEEN_LOOKS = 1.0


# Inode, size in bytes and modification time in ns of each path; None if the file is gone.
FileStats = dict[str, tuple[int, int, int] | None]


def file_stats(paths: Iterable[str]) -> FileStats:
    """Return the stats of files, which show later whether a file has changed."""
    return {path: _stat(path) for path in paths}


def changed_files(before: FileStats) -> list[str]:
    """Return the files whose stats are not the earlier ones."""
    return sorted(path for path, stat in before.items() if stat != _stat(path))


def require_unchanged(before: FileStats) -> None:
    """Refuse a merge if one of its weight files has changed.

    Raises:
        BadInputError: if so; names the first of them.
    """
    changed = changed_files(before)
    if changed:
        raise BadInputError(
            f"Weight file {changed[0]} has changed since this merge began, which would mix two "
            "models; merge again when no program writes to it."
        )


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
    """A thread-safe cache of surveys. A survey is valid until a file of its models changes."""

    def __init__(self) -> None:
        self._kept: dict[Checkpoints, _Kept] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()

    def begin(self, checkpoints: "Checkpoints") -> None:
        """Prepare for a merge: forget models whose files have changed, and record its files."""
        with self._lock:
            for known, kept in list(self._kept.items()):
                if changed_files(kept.files):
                    del self._kept[known]
                    known.forget_files()
            self._keep(checkpoints)

    def require_unchanged(self, checkpoints: "Checkpoints", at_once: bool = False) -> None:
        """Stop a merge if a weight file of its models has changed since it began.

        Args:
            checkpoints: the models.
            at_once: check now, even if the last check was less than a second ago.

        Raises:
            ValueError: if a weight file has changed.
        """
        with self._lock:
            self._require_unchanged(checkpoints, at_once)

    def survey_of(
        self,
        checkpoints: "Checkpoints",
        device: "Device",
        progress: bool,
        mapper: Mapper = in_this_process,
        products: bool = False,
    ) -> Survey:
        """Return the survey of the models; take it if the cache has none.

        Only one thread takes it. The others wait for the result.

        Args:
            checkpoints: the models of the merge.
            device: the torch device that computes.
            progress: whether to show a progress bar.
            mapper: runs the measurements, in this process or on a cluster.
            products: whether it must have inner products.

        Raises:
            ValueError: if a weight file has changed since the merge began, or the models
                cannot be compared.
        """
        with self._lock:
            kept = self._keep(checkpoints)
            if kept.survey is None:
                kept.survey = self._of_more_experts(checkpoints)
            if kept.survey is None or (products and kept.survey.grams is None):
                self._require_unchanged(checkpoints, at_once=True)
                # Open files are mapped into memory. While the merge holds a tensor of a file,
                # all pages that are read through the same mapping stay in memory. So the survey
                # opens the files again: its own mappings are freed one by one.
                checkpoints.close_files()
                survey = checkpoints.survey(device, progress, products=products, mapper=mapper)
                self._require_unchanged(checkpoints, at_once=True)
                kept.survey = survey
            return kept.survey

    def share(self, models: Iterable["Checkpoints"]) -> "dict[Checkpoints, Survey]":
        """Return the cached surveys of these models, for other processes that merge them."""
        with self._lock:
            kept = {checkpoints: self._kept[checkpoints].survey for checkpoints in models}
        return {checkpoints: survey for checkpoints, survey in kept.items() if survey}

    def adopt(self, shared: "dict[Checkpoints, Survey]") -> None:
        """Keep surveys that another process took, as surveys of the files as they are now."""
        with self._lock:
            for checkpoints, survey in shared.items():
                self._kept.pop(checkpoints, None)
                self._keep(checkpoints).survey = survey

    def _of_more_experts(self, checkpoints: "Checkpoints") -> Survey | None:
        """Return what a cached survey of more experts says of these models."""
        for known, kept in self._kept.items():
            survey = kept.survey if known.base == checkpoints.base else None
            if survey and (some := survey.of_some(checkpoints.experts)):
                return replace(some, source=checkpoints)
        return None

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
        require_unchanged(kept.files)
