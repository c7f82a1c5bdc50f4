"""What a merge costs, beside MergeKit's own methods: `python -m benchmarks.speed`.

Each merge is MergeKit's ``run_merge`` in a process of its own, from files to files; methods take
turns. Writes benchmarks/results/speed.md and speed.json.
"""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.families import make_family
from benchmarks.machine import described
from benchmarks.results_file import RESULTS, write_measured
from benchmarks.timing import Case, Run, interleaved, machine_limits, median, spread, weight_bytes

# Every expert in equal parts, at the density of the paper.
STOCK = [
    Case("linear", "linear", weight=1.0),
    Case("task_arithmetic", "task_arithmetic", weight=0.3),
    Case("ties", "ties", weight=0.3, parameters={"density": 0.55}),
    Case("dare_linear", "dare_linear", weight=0.3, parameters={"density": 0.55}),
    Case("sce", "sce"),
    Case("model_stock", "model_stock"),
]
PLAIN = [
    Case(f"metagpt, {g}", "metagpt", "task_arithmetic", parameters={"granularity": g})
    for g in ("tensor", "layer", "model")
]
SPARSIFIED = [
    Case(f"metagpt_{x}", f"metagpt_{x}", x, parameters={"density": 0.55})
    for x in ("ties", "dare_linear")
]
# A disk's noise, not the method, decides most of this: four cases show what is left of it.
ON_DISK = [STOCK[1], *PLAIN]
WAYS_TO_USE_A_GPU = {
    "--cuda": {},
    "--cuda --read-to-gpu --low-cpu-memory": {"read_to_gpu": True, "low_cpu_memory": True},
    "--multi-gpu": {"multi_gpu": True},
}


def cases(device: str) -> list[Case]:
    """Return what is timed in memory: all methods, or for a GPU the ways to use it."""
    if device == "cpu":
        return [*STOCK, *PLAIN, *SPARSIFIED]
    return [
        Case(
            f"{case.name}, {way}",
            case.method,
            case.counterpart and f"{case.counterpart}, {way}",
            case.weight,
            case.parameters,
            {"device": device, **options},
        )
        for way, options in WAYS_TO_USE_A_GPU.items()
        for case in (STOCK[1], *PLAIN)
    ]


def table(cases: Sequence[Case], runs: dict[str, list[Run]], moved: int) -> str:
    """Return a Markdown table; ``moved`` is what a merge has to read and write, in bytes."""
    lines = [
        "| method | seconds | spread | CPU seconds | peak memory, GB | GB/s "
        "| seconds, CPU, memory to stock |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        own = runs[case.name]
        seconds, cpu, peak = (median(own, key) for key in ("seconds", "cpu_seconds", "peak_bytes"))
        ratios = ""
        if case.counterpart:
            stock = runs[case.counterpart]
            ratios = " / ".join(
                f"**{median(own, key) / median(stock, key):.2f}**"
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            )
        lines.append(
            f"| `{case.name}` | {seconds:.2f} | {spread(own, 'seconds')} | {cpu:.2f} "
            f"| {peak / 1e9:.2f} | {moved / seconds / 1e9:.2f} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def limits_table(runs: dict[str, list[Run]], cases: Sequence[Case], moved: int) -> str:
    """Return the machine's own rates, and what share of them the quickest method reaches."""
    best = min(cases, key=lambda case: median(runs[case.name], "seconds"))
    rate = moved / median(runs[best.name], "seconds") / 1e9
    lines = [f"| the machine | GB/s | `{best.name}`, {rate:.2f} GB/s, is |", "|---|---|---|"]
    for name in ("reading the inputs", "copying in memory", "writing the output"):
        limit = median(runs[name], "rate")
        lines.append(f"| {name} | {limit:.1f} | {100 * rate / limit:.0f} % of it |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--parameters", default=500_000_000, show_default=True, help="of each model")
@click.option("--experts", default=3, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, help="stored and merged in")
@click.option("--device", default="cpu", show_default=True, help="of the arithmetic")
@click.option("--rounds", default=5, show_default=True, help="after one that warms up")
@click.option("--memory", default="/dev/shm", show_default=True, help="memory-backed folder")
@click.option("--disk", default=tempfile.gettempdir(), show_default=True, help="folder on a disk")
def main(
    parameters: int, experts: int, dtype: str, device: str, rounds: int, memory: str, disk: str
) -> None:
    """Time merges and print a table; results files are written for the default models."""
    text, raw = "", {}
    places = [(memory, "in memory", cases(device))]
    if device == "cpu":
        places.append((disk, "on disk", ON_DISK))
    for folder, place, chosen in places:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            paths = make_family(Path(directory), parameters, experts, getattr(torch, dtype))
            moved = weight_bytes(paths) + weight_bytes(paths[:1])
            actions = {case.name: partial(case.run, paths, dtype) for case in chosen}
            runs = interleaved({**machine_limits(paths), **actions}, rounds, place)
        raw[place] = runs
        text += (
            f"\n## Files {place}\n\n{table(chosen, runs, moved)}\n"
            f"{limits_table(runs, chosen, moved)}"
        )
    heading = (
        f"# The cost of a merge\n\n{parameters / 1e6:.0f} M parameters, a base and {experts} "
        f"experts in {dtype}, {rounds} interleaved rounds, medians; {described(device)}.\n"
        f"Written by `python -m benchmarks.speed`. GB/s counts what is read once and what is "
        f"written: {moved / 1e9:.2f} GB.\n"
    )
    print(heading + text)
    name = "speed" if device == "cpu" else "speed-gpu"
    write_measured(f"{name}.md", heading + text)
    (RESULTS / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
