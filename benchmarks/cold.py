"""Runs that read their files from the disk, with as much memory as the machine has or with less."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.timing import Run

# Where Linux keeps its control groups: of version 2, or the memory controller of version 1.
_ROOTS = {
    Path("/sys/fs/cgroup"): "memory.max",
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
}


def from_disk(paths: Sequence[Path], action: Callable[[], Run]) -> Callable[[], Run]:
    """Return an action that first drops the weight files of the paths from memory."""

    def run() -> Run:
        os.sync()  # only what is on the disk can be dropped
        for path in paths:
            for file in path.glob("*.safetensors"):
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return action()

    return run


@contextmanager
def memory_limit(size: int) -> Iterator[Callable[[], None] | None]:
    """Yield what a child process calls to have no more than this memory, files included.

    Yield None where this user may not make control groups, as in most containers.
    """
    for root, file in _ROOTS.items():
        group = root / f"benchmark-{os.getpid()}"
        if not (root / file).exists() and root.name != "cgroup":
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / file).exists():
                continue
            (group / file).write_text(str(size))
            yield partial(_enter, group)
            return
        finally:
            group.rmdir()
    yield None


def _enter(group: Path) -> None:
    """Move this process into a control group."""
    (group / "cgroup.procs").write_text("0")
