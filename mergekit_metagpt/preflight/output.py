"""The directory that a merge is written to."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit.common import ModelReference
from rich.filesize import decimal

from mergekit_metagpt.planning.config import ConfigFile
from mergekit_metagpt.planning.directory import Output
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.preflight.costs import Costs


def bad_output(out: str, models: Mapping[ModelReference, ModelFiles]) -> Iterator[str]:
    """Find reasons not to write to a directory."""
    link = Path(out)
    if os.path.islink(out) and not link.exists():
        yield (
            f"Output {out} is a link to {os.readlink(link)}, which does not exist; make that "
            "directory, or choose another."
        )
        return
    path = Output.of(out).path
    for files in models.values():
        places = [p for p in (files.weights.directory, os.path.dirname(files.adapter or "")) if p]
        if any(_is_in(path, place) for place in places):
            yield (
                f"Output {out} is the input model {files.model}, or is inside it; choose "
                "another directory."
            )
            return
        if any(_is_in(Path(place).resolve(), str(path)) for place in places if path.exists()):
            yield (
                f"Output {out} is the folder that holds the input model {files.model}; choose a "
                f"new directory, such as {link / 'merged'}."
            )
            return
    try:
        yield from _unusable(out, path)
    except OSError as error:
        yield f"Output {out} cannot be used ({error.strerror}); choose another directory."
    applied = [Path(files.to_apply).resolve() for files in models.values() if files.to_apply]
    if any(path == place or path in place.parents for place in applied):
        yield (
            f"Output {out} is the --lora-merge-cache, or holds it, and MergeKit writes there "
            "first; choose another directory for one of them."
        )


def _unusable(out: str, path: Path) -> Iterator[str]:
    """Look at what is there, or at the directory that the output will be made in."""
    if path.exists() and not path.is_dir():
        yield f"Output {out} is a file; choose a directory that does not exist yet."
    elif Output.of(path).contents():
        merge = (path / "mergekit_config.yml").exists() or (path / "config.json").exists()
        held = "holds an older merge or model" if merge else "is not empty"
        yield f"Output directory {out} {held}; remove it, or choose another."
    elif not os.access(_existing(path), os.W_OK | os.X_OK):
        yield f"Output {out} cannot be written: {_existing(path)} is read-only; choose another."


def no_room(
    cost: Costs, out: str | None, config: ConfigFile, models: Mapping[ModelReference, ModelFiles]
) -> Iterator[str]:
    """Find disks that are too full for what will be written there.

    A merge is written inside its output if that exists, otherwise beside it. What is complete of
    the same merge need not be written again.
    """
    written = cost.bytes_written - (_complete(out, config) if out else 0)
    needs: dict[int, tuple[Path, int]] = {}
    caches = [files.to_apply for files in models.values() if files.to_apply]
    for place, size in ((out, written), (min(caches, default=None), cost.bytes_applied)):
        if place is not None:
            disk = _existing(Path(place).resolve())
            _, before = needs.get(disk.stat().st_dev, (disk, 0))
            needs[disk.stat().st_dev] = (disk, before + size)
    for disk, size in needs.values():
        free = shutil.disk_usage(disk).free
        if free < size:
            yield (
                f"The disk of {disk} has {decimal(free)} left, but {decimal(size)} will be "
                "written; make room, or write elsewhere."
            )


def _is_in(path: Path, directory: str) -> bool:
    """Return whether a path is a directory or inside it, also where case does not count."""
    return any(parent.exists() and parent.samefile(directory) for parent in (path, *path.parents))


def _complete(out: str, config: ConfigFile) -> int:
    """Return how many bytes are complete of an unfinished merge of a config into an output."""
    works = [work for work in Output.of(out).works() if work.facts.get("config") == config.raw]
    return sum(sum(r["bytes"].values()) for work in works for r in work.records.values())


def _existing(path: Path) -> Path:
    """Return a path, or the nearest parent of it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
