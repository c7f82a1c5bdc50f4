"""The directory of a merge: complete or absent, for one merge at a time, and resumed by itself.

A merge is written to a work directory that is named after everything its bytes depend on. So what
is complete there is always part of this merge, and the same command, run again, goes on from it.

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mergekit_metagpt.planning.durable import sync, write_whole
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)

_WORK = re.compile(r"(.*)\.metagpt-[0-9a-f]{16}(\.removed)?", re.DOTALL)


@dataclass(frozen=True)
class Work:
    """The work directory of a merge, at a path."""

    path: Path

    @property
    def merged(self) -> Path:
        """The directory that becomes the output."""
        return self.path / "merged"

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The records of complete files, by name; JSON types."""
        records = {}
        for path in self._written_records():
            with suppress(ValueError, LookupError, TypeError, AttributeError):  # it is damaged
                record = json.loads(path.read_text("utf-8"))
                if all(self._has(name, size) for name, size in record["bytes"].items()):
                    records[path.stem] = record
        return records

    def keep(self, name: str, record: dict[str, Any], files: Sequence[Path]) -> None:
        """Count files as complete, once they and their record are on the disk.

        Args:
            name: of the record.
            record: of JSON types.
            files: files of the work directory, which move to ``merged`` if they are not there.
        """
        sizes = {}
        for file in files:
            its = file.relative_to(self.merged) if self.merged in file.parents else file.name
            sync(file)
            os.replace(file, self.merged / its)
            sizes[str(its)] = (self.merged / its).stat().st_size
        sync(self.merged)
        write_whole(self.path / "complete" / f"{name}.json", {**record, "bytes": sizes})

    def prepare(self, facts: dict[str, Any]) -> None:
        """Make the directory, or clear it of everything that is not complete."""
        for directory in (self.merged, self.path / "complete"):
            directory.mkdir(parents=True, exist_ok=True)
        (self.path / "stopped").unlink(missing_ok=True)
        for leftover in self.path.glob("unfinished-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        records = self.records
        for path in self._written_records():
            if path.stem not in records:
                path.unlink()
        complete = {file for record in records.values() for file in record["bytes"]}
        for file in list(self.merged.rglob("*")):
            if file.is_file() and str(file.relative_to(self.merged)) not in complete:
                file.unlink()
        write_whole(self.path / "merge.json", facts)

    @property
    def is_stopped(self) -> bool:
        """Whether tasks of a cluster that have not begun are to end at once."""
        return (self.path / "stopped").exists()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let tasks of a cluster end before the context does."""
        mark = self.path / "stopped"
        mark.touch()
        try:
            yield
        finally:
            mark.unlink()

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

    def _written_records(self) -> list[Path]:
        return sorted((self.path / "complete").glob("*.json"))

    def _has(self, name: str, size: int) -> bool:
        file = self.merged / name
        return file.exists() and file.stat().st_size == size


@dataclass(frozen=True)
class Output:
    """The output of a merge.

    A merge is written beside its output, and renamed to it at the end. But nothing can be
    renamed to an existing directory that is a mount point, and not every system says that it is
    one (a container's volume may be on the same disk). So a merge into an existing directory is
    always written inside it, which also uses the right disk.

    Attributes:
        path: the output, with links followed.
        workplace: the directory that the merge is written in: the output if it exists, or else
            its parent.
    """

    path: Path
    workplace: Path

    @classmethod
    def of(cls, out: Path | str) -> "Output":
        """Look at an output as it is now."""
        path = Path(out).resolve()
        return cls(path, path if path.is_dir() else path.parent)

    @property
    def _lock(self) -> Path:
        return self.workplace / f"{self.path.name}.metagpt-lock"

    def works(self) -> list[Work]:
        """Return the work directories of unfinished merges into this output."""
        return [Work(path) for path, is_removed in self._own_directories() if not is_removed]

    def _own_directories(self) -> Iterator[tuple[Path, bool]]:
        """Yield work directories, and whether they were being removed by a killed process."""
        if self.workplace.is_dir():
            for path in sorted(self.workplace.iterdir()):
                name = _WORK.fullmatch(path.name)
                is_own = name and name[1] == self.path.name and (path / "complete").is_dir()
                if name and is_own:
                    yield path, bool(name[2])

    def contents(self) -> set[Path]:
        """Return what the output holds, except for files of unfinished merges into it."""
        if not self.path.is_dir():
            return set()
        own = {self._lock, *(path for path, _ in self._own_directories())}
        for work in self.works():
            own |= {self.path / name for name in work.moved}
        return set(self.path.iterdir()) - own

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the output for one merge.

        Raises:
            BadInputError: if another merge is writing the output, or it is not empty.
        """
        self.workplace.mkdir(parents=True, exist_ok=True)
        with self._holding_lock():
            if self.contents():
                raise BadInputError(f"Output directory {self.path} is not empty.")
            for path, is_removed in list(self._own_directories()):
                if is_removed:
                    shutil.rmtree(path)
                else:
                    self._take_back(Work(path))
            yield

    @contextmanager
    def work(self, key: str, facts: dict[str, Any], is_valid: Callable[[], bool]) -> Iterator[Work]:
        """Give the work directory of a merge, with everything in it that is complete.

        It is removed at the end, or after an exception if nothing in it is complete.

        Args:
            key: 16 or more hexadecimal digits, which name the merge.
            facts: the same for people; JSON types.
            is_valid: returns whether all that is complete is still a part of this merge.
        """
        work = Work(self.workplace / f"{self.path.name}.metagpt-{key[:16]}")
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
                _remove(work.path)
            raise
        _remove(work.path)

    def publish(self, work: Work) -> None:
        """Move a complete merge to the output; if that fails, it stays where it is."""
        is_inside = self.workplace == self.path
        if self.contents() if is_inside else self.path.exists():
            raise FileExistsError(
                f"{self.path} is no longer empty, or was made while the merge ran; remove it, and "
                "run the same command again."
            )
        if not is_inside:
            os.rename(work.merged, self.path)
            return
        files = sorted(work.merged.iterdir(), key=lambda file: (_rank(file.name), file.name))
        write_whole(work.path / "moved.json", [file.name for file in files])
        try:
            for file in files:
                os.rename(file, self.path / file.name)
        except BaseException:
            self._take_back(work)
            raise
        (work.path / "moved.json").unlink()

    def _take_back(self, work: Work) -> None:
        """Undo what a merge had moved to its output when it was stopped."""
        for name in work.moved:
            with suppress(FileNotFoundError):  # not moved yet
                os.rename(self.path / name, work.merged / name)
        (work.path / "moved.json").unlink(missing_ok=True)

    @contextmanager
    def _holding_lock(self) -> Iterator[None]:
        lock = FileLock(self._lock, fallback_to_soft=False)
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
                self._lock.unlink()
            lock.release()


def _rank(name: str) -> int:
    """Move last what a model cannot be loaded without."""
    return 2 if name == "config.json" else 1 if name.endswith(".index.json") else 0


def _remove(path: Path) -> None:
    """Remove a directory that tasks of a cluster may still be writing to."""
    removed = path.with_name(f"{path.name}.removed")
    with suppress(OSError):
        os.rename(path, removed)  # so that they can make no more files there
    shutil.rmtree(removed, ignore_errors=True)
