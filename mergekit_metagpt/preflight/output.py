"""The directory that a merge is written to."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from mergekit_metagpt.planning.directory import Output
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.preflight.costs import Costs


def bad_output(job: Job, out: str) -> Iterator[str]:
    """Find reasons not to write to a directory."""
    path = Output.of(out).path
    try:
        why_not = _which_input(job, path) or _what_is_there(Path(out), path)
    except OSError as error:
        why_not = f"cannot be used ({error.strerror}); choose another directory"
    applied = [Path(files.to_apply).resolve() for files in job.models.values() if files.to_apply]
    if any(place.is_relative_to(path) for place in applied):
        why_not = (
            "is the --lora-merge-cache, or holds it, and MergeKit writes there first; choose "
            "another directory for one of them"
        )
    if why_not:
        yield f"Output {out} {why_not}."


def _which_input(job: Job, path: Path) -> str | None:
    for model, files in job.models.items():
        directories = (files.weights.directory, os.path.dirname(files.adapter or ""))
        places = [Path(place) for place in directories if place]
        if any(_is_in(path, place) for place in places):
            return f"is the input model {model}, or is inside it; choose another directory"
        if path.exists() and any(_is_in(place.resolve(), path) for place in places):
            return (
                f"is the folder that holds the input model {model}; choose a new directory, such "
                f"as {path / 'merged'}"
            )
    return None


def _what_is_there(out: Path, path: Path) -> str | None:
    """Look at what is there, or at the directory that the output will be made in."""
    if out.is_symlink() and not path.exists():
        return (
            f"is a link to {out.readlink()}, which does not exist; make that directory, or choose "
            "another"
        )
    if path.exists() and not path.is_dir():
        return "is a file; choose a directory that does not exist yet"
    if Output.of(path).contents():
        merge = (path / "mergekit_config.yml").exists() or (path / "config.json").exists()
        held = "holds an older merge or model" if merge else "is not empty"
        return f"{held}; remove it, or choose another"
    if not os.access(_existing(path), os.W_OK | os.X_OK):
        return f"cannot be written: {_existing(path)} is read-only; choose another"
    return None


def no_room(job: Job, out: str | None, cost: Costs) -> Iterator[str]:
    """Find disks that are too full for what will be written there.

    A merge is written inside its output if that exists, otherwise beside it. What is complete of
    the same merge need not be written again.
    """
    writes = [(job.options.lora_merge_cache or "", cost.bytes_applied)]
    if out:
        works = [it for it in Output.of(out).works() if it.facts.get("config") == job.config.raw]
        records = [record for work in works for record in work.records.values()]
        complete = sum(sum(record["bytes"].values()) for record in records)
        writes.insert(0, (out, cost.bytes_written - complete))
    disks: dict[int, tuple[Path, int]] = {}
    for place, size in writes:
        if size > 0:
            there = _existing(Path(place).resolve())
            first, others = disks.get(there.stat().st_dev, (there, 0))
            disks[there.stat().st_dev] = first, others + size
    for there, size in disks.values():
        free = shutil.disk_usage(there).free
        if free < size:
            yield (
                f"The disk of {there} has {decimal(free)} left, but {decimal(size)} will be "
                "written; make room, or write elsewhere."
            )


def _is_in(path: Path, directory: Path) -> bool:
    """Return whether a path is a directory or inside it, also where case does not count."""
    return any(parent.exists() and parent.samefile(directory) for parent in (path, *path.parents))


def _existing(path: Path) -> Path:
    """Return a path, or the nearest parent of it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
