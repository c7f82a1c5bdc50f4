"""Surveys that the merges of one process share."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.workers import Mapper, in_this_process

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints, Device, FileStats

# The surveys of one base and its experts, by the dtype that tensors were cast to.
Surveys = dict[torch.dtype | None, Survey]


@dataclass
class _Kept:
    files: "FileStats"
    surveys: Surveys = field(default_factory=dict)


class KeptSurveys:
    """What is known of models, until one of their files changes; for any number of threads."""

    def __init__(self) -> None:
        self._kept: dict[Checkpoints, _Kept] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()

    def forget_changed(self, checkpoints: "Checkpoints") -> None:
        """Drop what is known of these models, and open their files anew, if one has changed."""
        with self._lock:
            kept = self._kept.get(checkpoints)
            if kept is not None and kept.files != checkpoints.file_stats():
                del self._kept[checkpoints]
                checkpoints.close_files()

    def survey_of(
        self,
        checkpoints: "Checkpoints",
        tensor: str | None,
        dtype: torch.dtype,
        device: "Device",
        progress: bool,
        mapper: Mapper = in_this_process,
    ) -> Survey:
        """Return the survey for a merge that is running, taking it only if it is not known yet.

        Threads that come while it is taken wait for it. It is taken again when a weight file
        has changed since.

        Args:
            checkpoints: the models that are merged.
            tensor: the name of the tensor that is merged now.
            dtype: the dtype that MergeKit hands this tensor over in. Where that is less than
                what is stored, the config's ``dtype`` has cast it, and the survey casts too.
            device: where the arithmetic is done.
            progress: whether a progress bar is shown.
            mapper: who measures the models.
        """
        self.forget_changed(checkpoints)
        with self._lock:
            kept = self._kept.get(checkpoints)
            if kept is None:
                kept = self._kept[checkpoints] = _Kept(checkpoints.file_stats())
            known = next(iter(kept.surveys.values()), None)
            surveyed = known.dtypes.get(tensor or "") if known else None  # not if tied to another
            stored = surveyed or checkpoints.stored_dtype(tensor) or dtype
            cast = None if torch.promote_types(stored, dtype) == dtype else dtype
            if cast not in kept.surveys:
                # The merge holds tensors of the files it has open, which keep all pages that are
                # read through them in memory; those that the survey opens itself are let go one
                # by one.
                checkpoints.close_files()
                kept.surveys[cast] = checkpoints.survey(cast, device, progress, mapper=mapper)
            return kept.surveys[cast]

    def share(self, models: Iterable["Checkpoints"]) -> "dict[Checkpoints, Surveys]":
        """Return what is known of these models, for processes that merge them too."""
        with self._lock:
            return {checkpoints: dict(self._kept[checkpoints].surveys) for checkpoints in models}

    def adopt(self, shared: "dict[Checkpoints, Surveys]") -> None:
        """Keep what another process has measured in the files that are here now."""
        with self._lock:
            for checkpoints, surveys in shared.items():
                self._kept[checkpoints] = _Kept(checkpoints.file_stats(), dict(surveys))
