"""Surveys that the merges of one process share."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mergekit_metagpt.checkpoints import Checkpoints, Device
from mergekit_metagpt.distributed import Mapper, in_this_process
from mergekit_metagpt.survey import Survey

# The surveys of one base and its experts, by the dtype that tensors were cast to.
Surveys = dict[torch.dtype | None, Survey]


@dataclass
class _Kept:
    fingerprint: tuple[tuple[str, int, int, int], ...]
    surveys: Surveys = field(default_factory=dict)


_KEPT: dict[Checkpoints, _Kept] = {}
_LOCK = threading.Lock()


def forget_changed(checkpoints: Checkpoints) -> None:
    """Drop what is known of these models, and open their files anew, if one has changed."""
    with _LOCK:
        kept = _KEPT.get(checkpoints)
        if kept is not None and kept.fingerprint != checkpoints.fingerprint():
            del _KEPT[checkpoints]
            _close_files(checkpoints)


def _close_files(checkpoints: Checkpoints) -> None:
    for model in checkpoints.models:
        checkpoints.loader(model).flush()  # type: ignore[no-untyped-call]


def kept_survey(
    checkpoints: Checkpoints,
    tensor: str | None,
    dtype: torch.dtype,
    device: Device,
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
    forget_changed(checkpoints)
    with _LOCK:
        kept = _KEPT.get(checkpoints)
        if kept is None:
            kept = _KEPT[checkpoints] = _Kept(checkpoints.fingerprint())
        known = next(iter(kept.surveys.values()), None)
        surveyed = known.dtypes.get(tensor or "") if known else None  # not if tied to another
        stored = surveyed or checkpoints.stored_dtype(tensor) or dtype
        cast = None if torch.promote_types(stored, dtype) == dtype else dtype
        if cast not in kept.surveys:
            # The merge holds tensors of the files it has open, which keep all pages that are read
            # through them in memory; those that the survey opens itself are let go one by one.
            _close_files(checkpoints)
            kept.surveys[cast] = checkpoints.survey(cast, device, progress, mapper=mapper)
        return kept.surveys[cast]


def surveys_to_share(models: Iterable[Checkpoints]) -> dict[Checkpoints, Surveys]:
    """Return what is known of these models, for processes that merge them too."""
    with _LOCK:
        return {checkpoints: dict(_KEPT[checkpoints].surveys) for checkpoints in models}


def adopt_surveys(shared: dict[Checkpoints, Surveys]) -> None:
    """Keep what another process has measured in the files that lie here now."""
    with _LOCK:
        for checkpoints, surveys in shared.items():
            _KEPT[checkpoints] = _Kept(checkpoints.fingerprint(), dict(surveys))
