"""The directory that a merge is written to."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from mergekit_metagpt.planning.directory import Output
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.preflight.costs import Costs


def bad_output(case: Case) -> Iterator[str]:
    """Find reasons not to write to a directory."""
    if case.out is None:
        return
    link, path = Path(case.out), Output.of(case.out).path
    if os.path.islink(case.out) and not link.exists():
        yield (
            f"Output {link} is a link to {os.readlink(link)}, which does not exist; make that "
            "directory, or choose another."
        )
        return
    for model, files in case.models.items():
        places = [p for p in (files.weights.directory, os.path.dirname(files.adapter or "")) if p]
        if any(_is_in(path, Path(place)) for place in places):
            yield (
                f"Output {case.out} is the input model {model}, or is inside it; choose another "
                "directory."
            )
            return
        if path.exists() and any(_is_in(Path(place).resolve(), path) for place in places):
            yield (
                f"Output {case.out} is the folder that holds the input model {model}; choose a "
                f"new directory, such as {link / 'merged'}."
            )
            return
    try:
        yield from _unusable(case.out, path)
    except OSError as error:
        yield f"Output {case.out} cannot be used ({error.strerror}); choose another directory."
    applied = [Path(files.to_apply).resolve() for files in case.models.values() if files.to_apply]
    if any(place.is_relative_to(path) for place in applied):
        yield (
            f"Output {case.out} is the --lora-merge-cache, or holds it, and MergeKit writes there "
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


def no_room(case: Case, cost: Costs) -> Iterator[str]:
    """Find disks that are too full for what will be written there.

    A merge is written inside its output if that exists, otherwise beside it. What is complete of
    the same merge need not be written again.
    """
    out = case.out or ""
    writes = [(out, cost.bytes_written)] if out else []
    for work in Output.of(out).works() if out else ():
        if work.facts.get("config") == case.raw:
            writes += [(out, -sum(it["bytes"].values())) for it in work.records.values()]
    if cost.bytes_applied:
        writes.append((case.options.lora_merge_cache or "", cost.bytes_applied))
    disks: dict[int, Path] = {}
    needed: Counter[int] = Counter()
    for place, size in writes:
        there = _existing(Path(place).resolve())
        disk = there.stat().st_dev
        disks.setdefault(disk, there)
        needed[disk] += size
    for disk, size in needed.items():
        free = shutil.disk_usage(disks[disk]).free
        if free < size:
            yield (
                f"The disk of {disks[disk]} has {decimal(free)} left, but {decimal(size)} will be "
                "written; make room, or write elsewhere."
            )


def _is_in(path: Path, directory: Path) -> bool:
    """Return whether a path is a directory or inside it, also where case does not count."""
    return any(parent.exists() and parent.samefile(directory) for parent in (path, *path.parents))


def _existing(path: Path) -> Path:
    """Return a path, or the nearest parent of it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
