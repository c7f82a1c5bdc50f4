"""The work directory of a merge: what is complete there survives whatever stops the merge.

- ``OUT.metagpt-KEY/merged``: what becomes OUT.
- ``OUT.metagpt-KEY/complete``: a small record of each weight file that is complete.
- ``OUT.metagpt-KEY/moved.json``: the files that are being moved into an OUT that existed before.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        for path in (self.path / "complete").glob("*.json"):
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
        _write_whole(self.path / "complete" / f"{name}.json", {**record, "bytes": sizes})

    def prepare(self, facts: dict[str, Any]) -> None:
        """Make the directory, or clear it of everything that is not complete."""
        for directory in (self.merged, self.path / "complete"):
            directory.mkdir(parents=True, exist_ok=True)
        self.stopped.unlink(missing_ok=True)
        for leftover in self.path.glob("unfinished-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        records = self.records
        for path in (self.path / "complete").glob("*.json"):
            if path.stem not in records:
                path.unlink()
        complete = {file for record in records.values() for file in record["bytes"]}
        for file in list(self.merged.rglob("*")):
            if file.is_file() and str(file.relative_to(self.merged)) not in complete:
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


def _rank(name: str) -> int:
    """Move last what a model cannot be loaded without."""
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
