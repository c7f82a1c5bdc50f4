"""What a merge spends its time on: `python -m benchmarks.shares`.

Each merge is MergeKit's ``run_merge`` under Python's profiler, from files in memory to files in
memory. Prints a table; the medians of its rounds.
"""

import cProfile
import pstats
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.io.tasks import LoadTensor
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge import run_merge
from mergekit.merge_methods import GeneralizedTaskArithmeticMerge
from mergekit.plan import MergePlanner

from benchmarks.families import BLOCKS, make_family, sized
from benchmarks.machine import described
from benchmarks.one_merge import one_merge
from benchmarks.speed import DIRECTION, PLAIN, TASK_ARITHMETIC
from benchmarks.tables import table
from benchmarks.timing import Case
from mergekit_metagpt.core.directions import merge_directions
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms
from mergekit_metagpt.measure.checkpoints import Checkpoints

CASES = [TASK_ARITHMETIC, *PLAIN, DIRECTION]
# None of them calls another one.
PARTS: dict[str, list[Callable[..., Any]]] = {
    "planning": [MergePlanner.plan_to_disk],
    "opening inputs": [LoadTensor.execute],
    "survey": [Checkpoints.survey],
    "norms": [squared_norms],
    "merging": [GeneralizedTaskArithmeticMerge.merge_group, add_task_vectors, merge_directions],
    "writing": [TensorWriter.finalize],
}


def seconds(case: Case, paths: list[Path], dtype: str) -> dict[str, float]:
    """Merge once; return the seconds of each part, of the rest, and of all."""
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        out, cache = Path(folder, "merged"), Path(folder, "cache")
        profile.runcall(one_merge, case.config(paths, dtype), out, cache, {})
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = {part: sum(_cumulative(stats, f) for f in parts) for part, parts in PARTS.items()}
    if found["survey"]:  # which measures by the same function
        found["norms"] = 0.0
    whole = _cumulative(stats, run_merge)
    return {**found, "the rest": whole - sum(found.values()), "all": whole}


def _cumulative(stats: dict[Any, Any], function: Callable[..., Any]) -> float:
    """Return the seconds from the beginnings to the ends of a function's calls."""
    code = getattr(function, "__func__", function).__code__
    key = (code.co_filename, code.co_firstlineno, code.co_name)
    return float(stats[key][3]) if key in stats else 0.0


@click.command()
@click.option("--parameters", default=500_000_000, show_default=True, help="of each model")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="after one that warms up")
def main(parameters: int, dtype: str, rounds: int) -> None:
    """Profile merges and print a table."""
    block = "a block of Llama 2 7B"
    lines = []
    for label, config in ((f"{parameters / 1e9:g} B", sized(parameters)), (block, BLOCKS[block])):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            paths = make_family(Path(folder), config, 3, getattr(torch, dtype))
            runs: dict[str, list[dict[str, float]]] = {case.name: [] for case in CASES}
            for _ in range(1 + rounds):
                for case in CASES:
                    runs[case.name].append(seconds(case, paths, dtype))
        for name, own in runs.items():
            cells = (statistics.median(run[part] for run in own[1:]) for part in own[0])
            lines.append([f"{label}: `{name}`", *(f"{cell:.2f}" for cell in cells)])
    header = ["seconds", *PARTS, "the rest", "all"]
    print(f"{table(header, lines)}\n\nA base and three experts, on {described()}.")


if __name__ == "__main__":
    main()
