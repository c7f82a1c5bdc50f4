"""Surveys, each taken once: a small cache on disk keeps them for every command and call.

A survey is looked up by the identity of everything it depends on, so it cannot be that of other
models, nor of the same ones before a file changed.
"""

import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import platformdirs
import torch

from mergekit_metagpt.measure import identity
from mergekit_metagpt.measure.survey import Measured, Survey
from mergekit_metagpt.wording import counted
from mergekit_metagpt.workers import Mapper, in_this_process

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints, Device

LOG = logging.getLogger(__name__)

_LAYOUT = 3  # of the files in the cache
# A merge checks its files at each tensor. On a file server, each check costs a round trip.
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class _Begun:
    """A merge that has begun."""

    files: dict[str, identity.Stat]  # its weight files
    looked: float  # when they were last looked at, in seconds
    survey: Survey | None = None


class Surveys:
    """The surveys of the merges that this process runs; thread-safe."""

    def __init__(self) -> None:
        self._begun: dict[Checkpoints, _Begun] = {}
        self._lock = threading.RLock()

    def begin(self, checkpoints: "Checkpoints", survey: Survey | None = None) -> None:
        """Prepare for a merge: record its weight files, and close what has changed before.

        The survey is one that another process has taken of these files.
        """
        with self._lock:
            for known, begun in list(self._begun.items()):
                changed = identity.changed_files(begun.files)
                if changed:
                    known.forget_files()
                if changed or known == checkpoints:
                    del self._begun[known]
            self._begin(checkpoints).survey = survey

    def require_unchanged(self, checkpoints: "Checkpoints", at_once: bool = False) -> None:
        """Stop a merge with a BadInputError if a weight file has changed since it began.

        Unless ``at_once``, do not look again within a second.
        """
        with self._lock:
            begun, now = self._begin(checkpoints), time.monotonic()
            if at_once or now - begun.looked >= _SECONDS_BETWEEN_LOOKS:
                begun.looked = now
                identity.require_unchanged(begun.files)

    def survey_of(
        self,
        checkpoints: "Checkpoints",
        device: "Device" = "cpu",
        progress: bool = False,
        mapper: Mapper = in_this_process,
        products: bool = False,
    ) -> Survey:
        """Return the survey of some models; take it if none is kept.

        Only one thread takes it. The others wait for the result. Arguments and errors are those
        of ``Checkpoints.survey``; a weight file that has changed is an error, too.
        """
        with self._lock:
            begun = self._begin(checkpoints)
            if begun.survey is None or (products and not begun.survey.has_products):
                self.require_unchanged(checkpoints, at_once=True)
                place, names = _place(checkpoints, torch.device(device).type)
                survey = _read(place, names, products)
                if survey is None:
                    survey = checkpoints.survey(device, progress, products, mapper)
                    self.require_unchanged(checkpoints, at_once=True)
                    _write(place, replace(survey, experts=names))
                if unread := checkpoints.unread():
                    LOG.warning(
                        "Model %s holds %s, which MergeKit does not know of and the merge will "
                        "drop; stop it, and merge the weight files with mergekit-pytorch.",
                        checkpoints.base,
                        counted(unread),
                    )
                for why in survey.left_out.values():
                    LOG.warning("%s; the tensor does not count towards the coefficients.", why)
                begun.survey = replace(survey, experts=checkpoints.experts)
            return begun.survey

    def _begin(self, checkpoints: "Checkpoints") -> _Begun:
        begun = self._begun.get(checkpoints)
        if begun is None:
            files = {path: identity.stat_of(path) for path in checkpoints.files()}
            begun = self._begun[checkpoints] = _Begun(files, time.monotonic())
        return begun


SURVEYS = Surveys()


def _place(checkpoints: "Checkpoints", device: str) -> tuple[Path, tuple[str, ...]]:
    """Return where a survey is kept, and the names that T experts have there: what they are.

    The folder is named after all that a survey depends on besides its experts.
    """
    packages = ("mergekit-metagpt", "mergekit", "torch", "transformers")
    base, *experts = map(checkpoints.identity, checkpoints.models)
    around = identity.digest(_LAYOUT, *map(version, packages), device, base)
    names = tuple(map(identity.digest, experts))
    cache = platformdirs.user_cache_path("mergekit-metagpt")
    return cache / "surveys" / around / f"{identity.digest(sorted(names))}.json", names


def _read(place: Path, experts: tuple[str, ...], products: bool) -> Survey | None:
    """Return the survey of these experts, or what one of more experts says of them."""
    for file in sorted(place.parent.glob("*.json"), key=lambda file: (file != place, file)):
        try:
            content = json.loads(file.read_text("utf-8"))
            for its in content["tensors"].values():
                its["norms"], its["dtype"] = tuple(its["norms"]), getattr(torch, its["dtype"][6:])
            tensors = {name: Measured(**its) for name, its in content["tensors"].items()}
            kept = Survey(tuple(content["experts"]), tensors, content["tied"], content["left_out"])
            survey = kept.of_some(experts)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # it was damaged
        if survey and not (products and not survey.has_products):
            return survey
    return None


def _write(place: Path, survey: Survey) -> None:
    """Keep a survey. Where there is no room for it, it is taken again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent) as unfinished:  # goes, whatever happens
            part = Path(unfinished, place.name)
            part.write_text(json.dumps(asdict(survey), default=str), encoding="utf-8")
            os.replace(part, place)
    except OSError as error:
        LOG.info("The survey could not be kept in %s: %s", place, error)
