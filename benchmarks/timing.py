"""Time merges, each in its own process, and the machine's limits, in interleaved rounds."""

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tqdm

from benchmarks.one_merge import one_merge

# Each is new, but has imported all that a merge needs, which takes longer than most merges.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["benchmarks.one_merge"])

Run = dict[str, float]
_BLOCK = 1 << 24
# The names of the actions that any merge has to do.
READING, WRITING = "reading the inputs", "writing the output"


@dataclass(frozen=True)
class Case:
    """A merge to time.

    Attributes:
        name: the name in the tables.
        method: MergeKit's name of the method.
        counterpart: the name of the stock case to compare it with, if there is one.
        weight: the weight of each expert, for methods that need one.
        parameters: the parameters in the config.
        settings: other keys of the config.
        options: MergeKit's options.
    """

    name: str
    method: str
    counterpart: str | None = None
    weight: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, paths: Sequence[Path], dtype: str) -> dict[str, Any]:
        """Return the MergeKit config that merges a family; the first path is the base's."""
        given = {} if self.weight is None else {"parameters": {"weight": self.weight}}
        config = {
            "merge_method": self.method,
            "models": [{"model": str(path), **given} for path in paths[1:]],
            "parameters": dict(self.parameters),
            "dtype": dtype,
            **self.settings,
        }
        if self.method != "linear":  # which would average the base in
            config["base_model"] = str(paths[0])
        return config

    def run(
        self, paths: Sequence[Path], dtype: str, start: Callable[[], None] | None = None
    ) -> Run:
        """Merge once, into a folder beside the family, and remove the result.

        No survey of an earlier run is found. ``start`` is called in the process of the merge,
        before anything else.

        Raises:
            RuntimeError: if the merge fails.
        """
        out, cache = paths[0].parent / "merged", paths[0].parent / "cache"
        config = self.config(paths, dtype)
        with ProcessPoolExecutor(1, mp_context=_PROCESSES) as process:
            merged = process.submit(one_merge, config, out, cache, dict(self.options), start)
            error = merged.exception()
        for folder in (out, cache):
            shutil.rmtree(folder, ignore_errors=True)
        if error:
            raise RuntimeError(f"{self.name} failed: {error}") from error
        return merged.result()


def interleaved(
    actions: Mapping[str, Callable[[], Run]], rounds: int, label: str, warm_up: int = 1
) -> dict[str, list[Run]]:
    """Run the actions in turn; return the runs of each, without those of the warm-up rounds.

    The order is reversed each round, so that no action always follows the same one.
    """
    runs: dict[str, list[Run]] = {name: [] for name in actions}
    for number in tqdm.trange(warm_up + rounds, desc=label):
        for name in list(actions)[:: 1 if number % 2 else -1]:
            run = actions[name]()
            if number >= warm_up:
                runs[name].append(run)
    return runs


def median(runs: Sequence[Run], key: str) -> float:
    """Return the median of one figure of the runs."""
    return statistics.median(run[key] for run in runs)


def spread(runs: Sequence[Run], key: str) -> str:
    """Return the minimum and the maximum of one figure of the runs."""
    values = [run[key] for run in runs]
    return f"{min(values):.2f} to {max(values):.2f}"


def weight_bytes(paths: Sequence[Path]) -> int:
    """Return the size of all weight files."""
    return sum(file.stat().st_size for path in paths for file in path.glob("*.safetensors"))


def machine_limits(paths: Sequence[Path]) -> dict[str, Callable[[], Run]]:
    """Return the actions that bound any merge of a family: reading, copying in memory, writing.

    A copy counts the bytes it reads and the bytes it writes.
    """
    size = weight_bytes(paths[:1])
    source = torch.ones(size // 2, dtype=torch.bfloat16)
    target = torch.zeros_like(source)

    def read() -> None:
        buffer = bytearray(_BLOCK)
        for path in paths:
            for file in path.glob("*.safetensors"):
                with file.open("rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass

    def write() -> None:
        file = paths[0].parent / "written"
        with file.open("wb", buffering=0) as stream:
            block = memoryview(bytearray(_BLOCK))
            for left in range(size, 0, -_BLOCK):
                stream.write(block[:left])
        file.unlink()

    return {
        READING: timed(read, weight_bytes(paths)),
        "copying in memory": timed(lambda: target.copy_(source), 2 * source.nbytes),
        WRITING: timed(write, size),
    }


def timed(action: Callable[[], object], moved: int, device: str = "cpu") -> Callable[[], Run]:
    """Return a function that gives the milliseconds and gigabytes per second of an action."""

    def run() -> Run:
        start = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        return {"milliseconds": 1e3 * seconds, "rate": moved / seconds / 1e9}

    return run
