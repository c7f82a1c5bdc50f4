"""The directory of a merge: complete or absent, for one merge at a time, and resumed by itself.

A merge is written to a work directory that is named after everything its bytes depend on. So what
is complete there is always part of this merge, and the same command, run again, goes on from it:

- ``OUT.metagpt-KEY/merged``: what becomes OUT.
- ``OUT.metagpt-KEY/complete``: a small record of each weight file that is complete.
- ``OUT.metagpt-KEY/moved.json``: the files that are being moved into an OUT that existed before.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The work directory of a merge, at a path."""

    path: Path

    @property
    def merged(self) -> Path:
        """The directory that becomes the output."""
        return self.path / "merged"

    @property
    def complete(self) -> Path:
        """The records of complete files."""
        return self.path / "complete"

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The records of complete files, by name; JSON types."""
        records = {}
        for path in self.complete.glob("*.json"):
            # If it is damaged, or a file is gone, it counts for nothing.
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                record = json.loads(path.read_text("utf-8"))
                sizes = record["bytes"].items()
                if all((self.merged / name).stat().st_size == size for name, size in sizes):
                    records[path.stem] = record
        return records

    def keep(self, name: str, record: dict[str, Any], files: Sequence[Path]) -> None:
        """Move files to ``merged``; they count as complete once they and a record are on the disk.

        The record is of JSON types, and files may be in ``merged`` already.
        """
        sizes = {}
        for file in files:
            its = file.relative_to(self.merged) if self.merged in file.parents else file.name
            _sync(file)
            os.replace(file, self.merged / its)
            sizes[str(its)] = (self.merged / its).stat().st_size
        _sync(self.merged)
        _write_whole(self.complete / f"{name}.json", {**record, "bytes": sizes})

    def prepare(self, facts: dict[str, Any]) -> None:
        """Make the directory, or clear it of everything that is not complete."""
        for directory in (self.merged, self.complete):
            directory.mkdir(parents=True, exist_ok=True)
        self.stopped.unlink(missing_ok=True)
        for leftover in self.path.glob("unfinished-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        records = self.records
        complete = {self.complete / f"{name}.json" for name in records}
        complete |= {self.merged / file for it in records.values() for file in it["bytes"]}
        for file in (*self.complete.iterdir(), *self.merged.rglob("*")):
            if file.is_file() and file not in complete:
                file.unlink()
        _write_whole(self.path / "merge.json", facts)

    @property
    def stopped(self) -> Path:
        """A file that is there when tasks of a cluster that have not begun are to end at once."""
        return self.path / "stopped"

    @property
    def facts(self) -> dict[str, Any]:
        """What the merge is, as ``prepare`` was told; empty if that has not been written."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.path / "merge.json").read_text("utf-8")))
        return {}

    @property
    def moved(self) -> list[str]:
        """The files that may be in the output already, moved there by a merge that was killed."""
        with suppress(FileNotFoundError):
            names = list(json.loads((self.path / "moved.json").read_text("utf-8")))
            if (self.merged / "config.json").exists():  # it is moved last
                return names
        return []

    def move_to(self, directory: Path) -> None:
        """Move what is merged into a directory; if that fails, nothing is moved."""
        files = sorted(self.merged.iterdir(), key=lambda file: (_rank(file.name), file.name))
        _write_whole(self.path / "moved.json", [file.name for file in files])
        try:
            for file in files:
                os.rename(file, directory / file.name)
        except BaseException:
            self.take_back(directory)
            raise
        (self.path / "moved.json").unlink()

    def take_back(self, directory: Path) -> None:
        """Undo what a merge had moved there when it was stopped."""
        for name in self.moved:
            with suppress(FileNotFoundError):  # not moved yet
                os.rename(directory / name, self.merged / name)
        (self.path / "moved.json").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory; until the end it is one that a later merge recognizes."""
        for path in (self.merged, self.path):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Output:
    """The output of a merge.

    A merge is written beside its output, and renamed to it at the end. But nothing can be
    renamed to an existing directory that is a mount point, and not every system says that it is
    one (a container's volume may be on the same disk). So a merge into an existing directory is
    always written inside it, which also uses the right disk.
    """

    path: Path  # with links followed
    workplace: Path  # the output if it exists, or else its parent

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
        return [work for work in works if work.complete.is_dir()]

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
        for other in self.works():  # this merge's to its place, all others out of the output
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
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps it until the release, which removes it
                if lock.is_locked:
                    path.unlink()
            lock.release()


def _rank(name: str) -> int:
    # What a model cannot be loaded without is moved last.
    return 2 if name == "config.json" else 1 if name.endswith(".index.json") else 0


def _write_whole(path: Path, content: Any) -> None:
    """Write JSON that is on the disk when this returns, and never half there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    if os.name != "posix" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
