"""The directory that a merge is written to."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit.common import ModelReference
from rich.filesize import decimal

from mergekit_metagpt.planning.directory import Output
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.preflight.costs import Costs


def bad_output(job: Job, out: str) -> Iterator[str]:
    """Find a reason not to write to a directory."""
    models = job.models  # outside: what is wrong with these is no fault of the directory
    try:
        why_not = _why_not(models, Path(out))
    except OSError as error:
        why_not = f"cannot be used ({error.strerror}); choose another directory"
    if why_not:
        yield f"Output {out} {why_not}."


def _why_not(models: Mapping[ModelReference, ModelFiles], out: Path) -> str | None:
    """Look at what is there, or at the directory that the output will be made in."""
    path = Output.of(out).path
    for model, files in models.items():
        if files.to_apply and Path(files.to_apply).resolve().is_relative_to(path):
            return (
                "is the --lora-merge-cache, or holds it, and MergeKit writes there first; choose "
                "another directory for one of them"
            )
        for place in (files.weights.directory, os.path.dirname(files.adapter or "")):
            # It is compared with what is there, since case may not count.
            existing = (it for it in (path, *path.parents) if place and it.exists())
            if any(it.samefile(place) for it in existing):
                return f"is the input model {model}, or is inside it; choose another directory"
    if out.is_symlink() and not path.exists():
        return (
            f"is a link to {out.readlink()}, which does not exist; make that directory, or choose "
            "another"
        )
    if path.exists() and not path.is_dir():
        return "is a file; choose a directory that does not exist yet"
    if Output.of(path).contents():
        return "is not empty; choose a directory that does not exist yet"
    if not os.access(_existing(path), os.W_OK | os.X_OK):
        return f"cannot be written: {_existing(path)} is read-only; choose another"
    return None


def no_room(job: Job, out: str | None, cost: Costs) -> Iterator[str]:
    """Find disks that are too full for what will be written there.

    A merge is written inside its output if that exists, otherwise beside it. What is complete of
    the same merge need not be written again.
    """
    writes = {job.options.lora_merge_cache or "": cost.bytes_applied}
    if out:
        works = [it for it in Output.of(out).works() if it.facts.get("config") == job.config.raw]
        records = [record for work in works for record in work.records.values()]
        writes[out] = cost.bytes_written - sum(sum(it["bytes"].values()) for it in records)
    needed: Counter[int] = Counter()
    for place, size in writes.items():
        if size <= 0:
            continue
        there = _existing(Path(place).resolve())
        disk, free = there.stat().st_dev, shutil.disk_usage(there).free
        needed[disk] += size
        if free < needed[disk]:
            yield (
                f"The disk of {there} has {decimal(free)} left, but {decimal(needed[disk])} will "
                "be written; make room, or write elsewhere."
            )


def _existing(path: Path) -> Path:
    """Return a path, or the nearest parent of it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
