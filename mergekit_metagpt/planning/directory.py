"""The directory of a merge: complete or absent, for one merge at a time, and resumed by itself.

A merge is written to a work directory that is named after everything its bytes depend on. So what
is complete there is always part of this merge, and the same command, run again, goes on from it.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_metagpt.planning.work import Work
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The output of a merge.

    A merge is written beside its output, and renamed to it at the end. But nothing can be
    renamed to an existing directory that is a mount point, and not every system says that it is
    one (a container's volume may be on the same disk). So a merge into an existing directory is
    always written inside it, which also uses the right disk.

    Attributes:
        path: the output, with links followed.
        workplace: the output if it exists, or else its parent.
    """

    path: Path
    workplace: Path

    @classmethod
    def of(cls, out: Path | str) -> "Output":
        """Look at an output as it is now."""
        path = Path(out).resolve()
        return cls(path, path if path.is_dir() else path.parent)

    def works(self) -> list[Work]:
        """Return the work directories of unfinished merges into this output.

        They are beside the output, or inside it; it may have been made since, or removed.
        """
        found = (*self.path.parent.glob("*.metagpt-*"), *self.path.glob("*.metagpt-*"))
        name = re.compile(re.escape(self.path.name) + r"\.metagpt-[0-9a-f]{16}")
        works = [Work(path) for path in sorted(found) if name.fullmatch(path.name)]
        return [work for work in works if (work.path / "complete").is_dir()]

    def _lock(self, place: Path) -> Path:
        return place / f"{self.path.name}.metagpt-lock"

    def contents(self) -> set[Path]:
        """Return what the output holds, except for files of unfinished merges into it."""
        if not self.path.is_dir():
            return set()
        own = {self._lock(self.path)}
        for work in self.works():
            own |= {work.path, *(self.path / name for name in work.moved)}
        return set(self.path.iterdir()) - own

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the output for one merge.

        Raises:
            BadInputError: if another merge is writing the output, or it is not empty.
        """
        self.workplace.mkdir(parents=True, exist_ok=True)
        places = {self.workplace}
        if self._lock(self.path.parent).exists():  # of a merge that began before there was one
            places.add(self.path.parent)
        with ExitStack() as locks:
            for place in sorted(places):
                locks.enter_context(self._holding_lock(self._lock(place)))
            if self.contents():
                raise BadInputError(
                    f"Output directory {self.path} is not empty; remove it, or choose another."
                )
            for work in self.works():
                work.take_back(self.path)
            yield

    @contextmanager
    def work(self, key: str, facts: dict[str, Any], is_valid: Callable[[], bool]) -> Iterator[Work]:
        """Give the work directory of a merge, with everything in it that is complete.

        It is removed at the end, or after an exception if nothing in it is complete, or if what
        is there may not be a part of this merge any more. The key's hexadecimal digits name the
        merge; the facts, of JSON types, say the same to people.
        """
        work = Work(self.workplace / f"{self.path.name}.metagpt-{key[:16]}")
        self._arrange(work)
        work.prepare(facts)
        try:
            yield work
        except BaseException:
            complete = len(work.records) if is_valid() else 0
            if complete:
                LOG.warning(
                    "What is complete of this merge (%d of its weight files) is kept in %s; run "
                    "the same command again to go on.",
                    complete,
                    work.path,
                )
            else:
                work.remove()
            raise
        work.remove()

    def _arrange(self, work: Work) -> None:
        """Move the work directory of this merge to its place, and all others out of the output."""
        for other in self.works():
            place = work.path.parent if other.path.name == work.path.name else self.path.parent
            with suppress(OSError):  # one of the two places is on another disk
                os.rename(other.path, place / other.path.name)
        for other in self.works():
            if other != work:
                LOG.warning(
                    "%s holds another merge that has not been finished; remove it if you do not "
                    "want to go on with that one.",
                    other.path,
                )

    def publish(self, work: Work) -> None:
        """Move a complete merge to the output; if that fails, it stays where it is."""
        is_inside = self.workplace == self.path
        if self.contents() if is_inside else self.path.exists():
            raise FileExistsError(
                f"{self.path} is no longer empty, or was made while the merge ran; remove it, and "
                "run the same command again."
            )
        if is_inside:
            work.move_to(self.path)
        else:
            os.rename(work.merged, self.path)

    @contextmanager
    def _holding_lock(self, path: Path) -> Iterator[None]:
        lock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            raise BadInputError(
                f"Another merge is writing {self.path}; wait until it ends, or choose another "
                "directory."
            ) from None
        except OSError as error:
            LOG.warning(
                "%s cannot be locked (%s); start no other merge into it.", self.path, reason(error)
            )
            yield
            return
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps it until the release, which removes it
                path.unlink()
            lock.release()
