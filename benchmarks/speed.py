"""The cost of a merge, compared with MergeKit's own methods: `python -m benchmarks.speed`.

Each merge is MergeKit's ``run_merge`` in its own process, from files to files. Methods take turns.
Writes benchmarks/results/speed.md and speed.json.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from benchmarks.cold import from_disk, memory_limit
from benchmarks.families import BLOCKS, make_family, sized
from benchmarks.machine import described
from benchmarks.results_file import write_measured, write_raw
from benchmarks.timing import (
    READING,
    WRITING,
    Case,
    Run,
    interleaved,
    machine_limits,
    median,
    spread,
    weight_bytes,
)


def in_another_way(case: Case, way: str, **changes: Any) -> Case:
    """Return a changed case, to compare with the stock case changed in the same way."""
    counterpart = case.counterpart and f"{case.counterpart}, {way}"
    return replace(case, name=f"{case.name}, {way}", counterpart=counterpart, **changes)


def in_float32(*cases: Case) -> list[Case]:
    """Return cases as in the README's examples: MergeKit casts all inputs, and the result back."""
    settings = {"dtype": "float32", "out_dtype": "bfloat16"}
    return [in_another_way(case, "in float32", settings=settings) for case in cases]


def sparsified(method: str) -> list[Case]:
    """Return a stock method at the paper's density, and its counterpart."""
    parameters = {"density": 0.55}
    return [
        Case(method, method, weight=0.3, parameters=parameters),
        Case(f"metagpt_{method}", f"metagpt_{method}", method, parameters=parameters),
    ]


TASK_ARITHMETIC = Case("task_arithmetic", "task_arithmetic", weight=0.3)
PLAIN = [
    Case(f"metagpt, {g}", "metagpt", "task_arithmetic", parameters={"granularity": g})
    for g in ("tensor", "layer", "model")
]
DIRECTION = Case(
    "metagpt, direction", "metagpt", "metagpt, tensor", parameters={"granularity": "direction"}
)
DARE = sparsified("dare_linear")
QUICK = [
    Case("linear", "linear", weight=1.0),
    TASK_ARITHMETIC,
    *PLAIN,
    DIRECTION,
    Case("model_stock", "model_stock"),
    *in_float32(TASK_ARITHMETIC, PLAIN[0]),
]
# The stock methods sort, or draw a random number for each element: they take 5 to 50 times as long.
SLOW = [
    Case("sce", "sce"),
    replace(PLAIN[0], counterpart="ties"),
    replace(DIRECTION, counterpart="ties"),
    *(
        case
        for method in ("ties", "breadcrumbs", "breadcrumbs_ties", "della")
        for case in sparsified(method)
    ),
    *DARE,
    *in_float32(*DARE),
]
OF_A_BLOCK = [TASK_ARITHMETIC, PLAIN[0], DIRECTION]
# On a disk, noise hides most differences between methods. A few cases are enough to show this.
ON_DISK = [TASK_ARITHMETIC, *PLAIN, DIRECTION]
WAYS_TO_USE_A_GPU: dict[str, dict[str, bool]] = {
    "--cuda": {},
    "--cuda --read-to-gpu --low-cpu-memory": {"read_to_gpu": True, "low_cpu_memory": True},
    "--multi-gpu": {"multi_gpu": True},
}


@dataclass(frozen=True)
class Series:
    """Cases that take turns, with models of one size and files in one place.

    Attributes:
        title: the heading.
        folder: where the files are.
        cases: what is timed.
        config: of each model.
        rounds: how often each case is timed.
        warm_up: how many rounds before that do not count.
        is_cold: whether files are dropped from memory before each run.
        memory: what a merge may use, files included, as a share of the input files; None if all.
    """

    title: str
    folder: str
    cases: Sequence[Case]
    config: transformers.LlamaConfig
    rounds: int
    warm_up: int = 1
    is_cold: bool = False
    memory: float | None = None


def on_gpu(device: str) -> list[Case]:
    """Return the ways to use a GPU, each with its own stock counterpart."""
    return [
        in_another_way(case, way, options={"device": device, **options})
        for way, options in WAYS_TO_USE_A_GPU.items()
        for case in (TASK_ARITHMETIC, *PLAIN)
    ]


def timed_series(series: Series, paths: Sequence[Path], dtype: str) -> dict[str, list[Run]]:
    """Time the cases of a series, and the machine's limits beside them."""
    limit = memory_limit(int((series.memory or 1) * weight_bytes(paths)))
    with limit if series.memory else nullcontext() as start:
        if series.memory and start is None:
            print(f"{series.title}: skipped, since this user may not limit memory.")
            return {}
        merges = {case.name: partial(case.run, paths, dtype, start) for case in series.cases}
        actions: dict[str, Callable[[], Run]] = {**machine_limits(paths), **merges}
        if series.is_cold:
            actions = {name: from_disk(paths, action) for name, action in actions.items()}
        return interleaved(actions, series.rounds, series.title, series.warm_up)


def table(cases: Sequence[Case], runs: dict[str, list[Run]], moved: int) -> str:
    """Return a Markdown table; ``moved`` is the number of bytes that a merge reads and writes."""
    lines = [
        "| method | seconds | spread | CPU seconds | peak memory, GB | from disk, GB | GB/s "
        "| seconds, CPU, memory to stock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        own = runs[case.name]
        seconds, cpu, peak, disk = (
            median(own, key) for key in ("seconds", "cpu_seconds", "peak_bytes", "disk_bytes")
        )
        ratios = ""
        if case.counterpart:
            stock = runs[case.counterpart]
            ratios = " / ".join(
                f"**{median(own, key) / median(stock, key):.2f}**"
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            )
        lines.append(
            f"| `{case.name}` | {seconds:.2f} | {spread(own, 'seconds')} | {cpu:.2f} "
            f"| {peak / 1e9:.2f} | {disk / 1e9:.2f} | {moved / seconds / 1e9:.2f} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def limits_table(runs: dict[str, list[Run]], cases: Sequence[Case], moved: int) -> str:
    """Return the machine's own rates, and the share of them that the fastest method reaches."""
    best = min(cases, key=lambda case: median(runs[case.name], "seconds"))
    rate = moved / median(runs[best.name], "seconds") / 1e9
    lines = [f"| the machine | GB/s | `{best.name}`, {rate:.2f} GB/s, is |", "|---|---|---|"]
    for name in (READING, "copying in memory", WRITING):
        limit = median(runs[name], "rate")
        lines.append(f"| {name} | {limit:.1f} | {100 * rate / limit:.0f} % of it |")
    return "\n".join(lines) + "\n"


def shares_table(runs: dict[str, list[Run]], cases: Sequence[Case]) -> str:
    """Return for each method how close it comes to reading the inputs and writing the output."""
    limit = sum(median(runs[name], "milliseconds") for name in (READING, WRITING)) / 1e3
    lines = [
        f"| method | seconds | share of the machine's limit, {limit:.2f} s for the same bytes |",
        "|---|---|---|",
    ]
    for case in cases:
        seconds = median(runs[case.name], "seconds")
        lines.append(f"| `{case.name}` | {seconds:.2f} | {100 * limit / seconds:.1f} % |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--parameters", default=500_000_000, show_default=True, help="of each model")
@click.option("--experts", default=3, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, help="stored and merged in")
@click.option("--device", default="cpu", show_default=True, help="of the arithmetic")
@click.option("--rounds", default=11, show_default=True, help="after one that warms up")
@click.option("--block-rounds", default=5, show_default=True, help="of blocks of large models")
@click.option("--slow-rounds", default=2, show_default=True, help="of methods that take long")
@click.option(
    "--slow-parameters", type=int, help="of each model, for methods that take long  [default: all]"
)
@click.option("--cold-rounds", default=3, show_default=True, help="of runs from a cold disk")
@click.option("--memory", default="/dev/shm", show_default=True, help="memory-backed folder")
@click.option("--disk", default=tempfile.gettempdir(), show_default=True, help="folder on a disk")
def main(
    parameters: int,
    experts: int,
    dtype: str,
    device: str,
    rounds: int,
    block_rounds: int,
    slow_rounds: int,
    slow_parameters: int | None,
    cold_rounds: int,
    memory: str,
    disk: str,
) -> None:
    """Time merges, print tables and write the results files."""
    on_cold_disk = partial(
        Series,
        folder=disk,
        cases=ON_DISK,
        config=sized(parameters),
        rounds=cold_rounds,
        warm_up=0,
        is_cold=True,
    )
    all_series = [
        Series("Files in memory", memory, QUICK, sized(parameters), rounds),
        *(
            Series(f"Files in memory, {block}", memory, OF_A_BLOCK, config, block_rounds)
            for block, config in BLOCKS.items()
        ),
        Series(
            "Sparsified, files in memory",
            memory,
            SLOW,
            sized(slow_parameters or parameters),
            slow_rounds,
            warm_up=0,
        ),
        Series("Files on a disk", disk, ON_DISK, sized(parameters), rounds),
        on_cold_disk("Cold files on a disk"),
        on_cold_disk("Cold files, more than fit in memory", memory=0.6),
    ]
    if device != "cpu":
        all_series = [Series("Files in memory", memory, on_gpu(device), sized(parameters), rounds)]
    text, raw = "", {}
    for series in all_series:
        with tempfile.TemporaryDirectory(dir=series.folder) as directory:
            paths = make_family(Path(directory), series.config, experts, getattr(torch, dtype))
            size = weight_bytes(paths[:1])
            moved = weight_bytes(paths) + size
            runs = timed_series(series, paths, dtype)
        if not runs:
            continue
        raw[series.title] = runs
        text += (
            f"\n## {series.title}\n\n{size / 1e6:.0f} MB a model, "
            f"{series.rounds} rounds; {moved / 1e9:.2f} GB are read once and written.\n\n"
            f"{table(series.cases, runs, moved)}\n{limits_table(runs, series.cases, moved)}\n"
            f"{shares_table(runs, series.cases)}"
        )
    heading = (
        f"# The cost of a merge\n\nA base and {experts} experts in {dtype}; interleaved rounds, "
        f"medians; {described(device)}.\nWritten by `python -m benchmarks.speed`. GB/s counts "
        "what is read once and what is written.\n"
    )
    print(heading + text)
    name = "speed" if device == "cpu" else "speed-gpu"
    write_measured(f"{name}.md", heading + text)
    write_raw(f"{name}.json", raw)


if __name__ == "__main__":
    main()
