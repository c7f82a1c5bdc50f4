"""One merge, to be timed in a process of its own."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def one_merge(
    config: dict[str, Any],
    out: Path,
    cache: Path,
    options: dict[str, Any],
    start: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Merge; return seconds, CPU seconds, peak resident memory and bytes read from disks.

    Args:
        config: MergeKit's.
        out: the output directory.
        cache: the directory of caches.
        options: MergeKit's.
        start: is called before anything else.
    """
    if start:
        start()
    os.environ["XDG_CACHE_HOME"] = str(cache)
    merge = MergeConfiguration.model_validate(config)
    settings = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, **options)
    settings.apply_global_options()  # type: ignore[no-untyped-call]
    if settings.device != "cpu":
        torch.ones(1, device=settings.device)  # create the context first: it is no part of a merge
    read = _disk_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    run_merge(merge, str(out), settings)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": _peak_bytes(),
        "disk_bytes": _disk_bytes() - read,
    }


def _peak_bytes() -> int:
    """Return the peak resident memory. ``getrusage`` would include the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; run this on Linux.")


def _disk_bytes() -> int:
    """Return how many bytes this process has fetched from disks."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes; run this on Linux.")
