"""The output of a running merge: locked, written to a partial directory, and published."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname

from filelock import FileLock, Timeout

from mergekit_metagpt.merging.journal import resumable
from mergekit_metagpt.planning.destination import Destination, Partial
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)


@contextmanager
def reserved(destination: Destination, resume: bool = False) -> Iterator[Partial]:
    """Keep an output for one merge, and make a directory to write it to.

    First removes what earlier merges into this output have left behind; with ``resume``, all but
    the directory of the last one that can go on, which is used again.

    Raises:
        BadInputError: if another merge is writing the output, or it is not empty.
    """
    destination.workplace.mkdir(parents=True, exist_ok=True)
    with _locked(destination) as is_locked:
        if destination.contents():
            raise BadInputError(f"Output directory {destination.path} is not empty.")
        resumed = resumable(destination) if resume else None
        if is_locked:  # so the merges on this host that made these are dead
            for leftover in set(destination.unfinished()) - {resumed}:
                _discard_own(leftover, destination)
        if resumed:
            _take_back(resumed, destination)
            yield resumed
            return
        partial = destination.new_partial()
        with partial.mark.open("x", encoding="utf-8") as mark:
            mark.write(gethostname())
        partial.path.mkdir()
        yield partial


@contextmanager
def _locked(destination: Destination) -> Iterator[bool]:
    """Hold the lock of an output; yield whether the file system has locks at all."""
    lock = FileLock(destination.lock, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        raise BadInputError(
            f"Another merge is writing {destination.path}; wait until it ends, or choose another "
            "directory."
        ) from None
    except OSError as error:
        LOG.warning(
            "%s cannot be locked (%s); start no other merge into it.",
            destination.path,
            reason(error),
        )
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows keeps it until the release, which removes it
            destination.lock.unlink()
        lock.release()


def _discard_own(leftover: Partial, destination: Destination) -> None:
    """Remove a leftover of this host; some network file systems lock within one host only."""
    if leftover.host == gethostname():
        _take_back(leftover, destination)
        discard(leftover)
    else:
        LOG.warning(
            "%s belongs to a merge on host %s; remove it if that has ended.",
            leftover.path,
            leftover.host,
        )


def _take_back(partial: Partial, destination: Destination) -> None:
    """Undo what a merge had moved to its output when it was killed."""
    for name in partial.moved:
        with suppress(FileNotFoundError):  # not moved yet
            os.rename(destination.path / name, partial.path / name)


def publish(partial: Partial, destination: Destination) -> None:
    """Move a complete merge to the output; if that fails, it stays in its partial directory."""
    if destination.exists:
        _move_files(partial, destination)
        partial.path.rmdir()
    else:
        os.rename(partial.path, destination.path)
    keep(partial)


def _move_files(partial: Partial, destination: Destination) -> None:
    """Move a model's files into the output, last those without which it cannot be loaded."""
    if destination.contents():
        raise FileExistsError(f"{destination.path} is no longer empty")
    files = sorted(partial.path.iterdir(), key=lambda file: (_rank(file.name), file.name))
    partial.note("moved", [file.name for file in files])
    moved: list[Path] = []
    try:
        for file in files:
            moved.append(file)
            os.rename(file, destination.path / file.name)
    except BaseException:
        for file in reversed(moved):
            with suppress(FileNotFoundError):  # the one that could not be moved
                os.rename(destination.path / file.name, file)
        raise


def _rank(name: str) -> int:
    return 2 if name == "config.json" else 1 if name.endswith(".index.json") else 0


def keep(partial: Partial) -> None:
    """Keep later merges from removing a directory."""
    partial.mark.unlink(missing_ok=True)


def discard(partial: Partial) -> None:
    """Remove a directory that threads may still be writing to."""
    with suppress(OSError):
        os.rename(partial.path, partial.removed)  # so that they can make no more files there
    for path in (partial.removed, partial.path):
        shutil.rmtree(path, ignore_errors=True)
    if not (partial.removed.exists() or partial.path.exists()):
        partial.mark.unlink(missing_ok=True)
