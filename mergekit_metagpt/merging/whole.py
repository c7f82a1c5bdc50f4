"""Merges that appear whole or not at all."""

import glob
import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from operator import itemgetter
from pathlib import Path

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_metagpt.merging.record import merge_record, write_card
from mergekit_metagpt.method.session import SESSION

_MARK = ".metagpt-partial-"

# Merges a config, whose YAML is the second argument, into a new directory.
Merger = Callable[[MergeConfiguration, str, Path, MergeOptions], None]


def merge_here(
    config: MergeConfiguration, source: str, directory: Path, options: MergeOptions
) -> None:
    """Merge in this process, with MergeKit's ``run_merge``."""
    run_merge(config, str(directory), options, config_source=source)
    require_in_range(directory, config.out_dtype)


def merge_whole(
    config: MergeConfiguration,
    source: str,
    out: Path,
    options: MergeOptions,
    merge: Merger = merge_here,
) -> None:
    """Merge beside ``out``, record it, and rename the finished whole.

    Until the rename the merge lies in ``OUT.metagpt-partial-PID``. A merge that fails takes
    that along; one that is killed leaves it to the next merge into ``out``.

    Args:
        config: what to merge; MergeKit changes it.
        source: its YAML, as it was written.
        out: the directory to make; must not exist, or be empty.
        options: MergeKit's options.
        merge: writes everything but the record.

    Raises:
        OSError: if ``out`` is in use by then, or the disk is full.
        ValueError: if a merged tensor overflows ``out_dtype``.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    partial = out.with_name(f"{out.name}{_MARK}{os.getpid()}")
    given = config.model_copy(deep=True)
    started = _now()
    try:
        with SESSION.journal() as entries:
            merge(config, source, partial, options)
        record = merge_record(given, source, entries, options)
        if options.write_model_card:
            # MergeKit has named the model after the directory that it wrote to.
            write_card(partial / "README.md", out.name, given, source, record)
        record["times"] = {"started": started, "finished": _now()}
        (partial / "metagpt.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_leftovers(out: Path) -> None:
    """Remove what merges into ``out`` left behind whose processes are gone."""
    for leftover in out.parent.glob(f"{glob.escape(out.name)}{_MARK}*"):
        process = leftover.name.rpartition("-")[2]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return process != os.getpid()


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Refuse a merge that overflowed ``out_dtype``, to which MergeKit rounds unchecked."""
    if dtype_from_name(out_dtype) != torch.float16:
        return
    loader = ModelReference.model_validate(str(merged)).lazy_loader()
    for name, _ in sorted(loader.index.tensor_paths.items(), key=itemgetter(1)):  # by shard
        tensor = loader.get_tensor(name)
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(
                f"Merging tensor {name} overflows {tensor.dtype}; set a wider one (out_dtype: "
                "bfloat16 or float32)."
            )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
