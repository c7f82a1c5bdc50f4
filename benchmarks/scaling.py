"""How the cost of a merge grows: `python -m benchmarks.scaling`.

Measures time and memory against the number of parameters (more layers, but the same largest
tensor), of experts and of shards.
Writes benchmarks/results/scaling.md, scaling.json and speed.png.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.families import make_family, sized
from benchmarks.machine import described
from benchmarks.results_file import RESULTS, write_measured, write_raw
from benchmarks.speed import DIRECTION, PLAIN, TASK_ARITHMETIC
from benchmarks.timing import Case, Run, interleaved, median, weight_bytes

WIDTH = 512
LAYERS = (10, 30, 70)
EXPERTS = (2, 4, 6, 8)
SHARD_SIZES = ("500MB", "25MB")
# Input and output files are small: the memory for large files grows with the model up to a limit.
SHARD_SIZE, OUT_SHARD_SIZE = "50MB", 25_000_000  # the second in elements of two bytes
CASES = [
    TASK_ARITHMETIC,
    *(case for case in PLAIN if case.name != "metagpt, layer"),
    DIRECTION,
]


@dataclass(frozen=True)
class Point:
    """A family at one size.

    Attributes:
        axis: the quantity that grows between points of the same axis.
        label: the value of this point on the axis.
        paths: the paths of the models, with the base first.
        parameters: the number of parameters of a model.
        files: the number of weight files of all models.
        moved: the bytes that a merge reads and writes.
    """

    axis: str
    label: str
    paths: Sequence[Path]
    parameters: float
    files: int
    moved: int

    @classmethod
    def of(cls, axis: str, label: str, paths: Sequence[Path]) -> "Point":
        """Measure the files."""
        size = weight_bytes(paths[:1])
        files = sum(len(list(path.glob("*.safetensors"))) for path in paths)
        return cls(axis, label, paths, size / 2, files, weight_bytes(paths) + size)


def points(directory: Path) -> list[Point]:
    """Make the checkpoints. All axes pass through 30 layers, three experts, files of 50 MB."""

    def family(layers: int, experts: int, shard_size: str) -> list[Path]:
        parameters = (64 + 13 * layers) * WIDTH**2
        folder = directory / f"{layers}-{shard_size}"
        return make_family(folder, sized(parameters, layers), experts, shard_size=shard_size)

    few, middle, many = (family(n, 8 if n == LAYERS[1] else 3, SHARD_SIZE) for n in LAYERS)
    by_layers = zip(LAYERS, (few, middle[:4], many), strict=True)
    return [
        *(Point.of("parameters", f"{layers} layers", paths) for layers, paths in by_layers),
        *(Point.of("experts", f"{n} experts", middle[: n + 1]) for n in EXPERTS),
        *(Point.of("shards", f"files of {s}", family(LAYERS[1], 3, s)) for s in SHARD_SIZES),
    ]


def linearity(points: Sequence[Point], runs: dict[str, list[Run]], case: Case) -> tuple[float, ...]:
    """Return slope in seconds per GB, intercept in seconds, and R² of seconds against bytes."""
    x = np.array([point.moved / 1e9 for point in points])
    y = np.array([median(runs[_key(point, case)], "seconds") for point in points])
    slope, intercept = np.polyfit(x, y, 1)
    residual = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return float(slope), float(intercept), float(1 - residual)


def report(points: Sequence[Point], runs: dict[str, list[Run]]) -> str:
    """Return Markdown: a table of all points, and how well lines fit them."""
    lines = [
        "| | M parameters | files | GB | "
        + " | ".join(f"`{c.name}`, s / GB" for c in CASES)
        + " |",
        "|---" * (4 + len(CASES)) + "|",
    ]
    for point in points:
        cells = [
            f"{median(own, 'seconds'):.2f} / {median(own, 'peak_bytes') / 1e9:.2f}"
            for own in (runs[_key(point, case)] for case in CASES)
        ]
        lines.append(
            f"| {point.label} | {point.parameters / 1e6:.0f} | {point.files} "
            f"| {point.moved / 1e9:.2f} | {' | '.join(cells)} |"
        )
    lines.append("\nSeconds against GB read and written, all points on one line:\n")
    for case in CASES:
        slope, intercept, r2 = linearity(points, runs, case)
        lines.append(f"- `{case.name}`: {intercept:.2f} s + {slope:.2f} s/GB, R² {r2:.3f}")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], runs: dict[str, list[Run]], path: Path) -> None:
    """Draw time against bytes, and peak memory against parameters and experts."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = [
        (list(points), "moved", 1e9, "GB read and written", "seconds", 1.0),
        ([p for p in points if p.axis == "parameters"], "parameters", 1e6,
         "M parameters, more layers", "peak_bytes", 1e9),
        ([p for p in points if p.axis == "experts"], "paths", 1, "experts", "peak_bytes", 1e9),
    ]  # fmt: skip
    for axis, (chosen, attribute, unit, label, key, scale) in zip(axes, panels, strict=True):
        for case in CASES:
            values = [getattr(point, attribute) for point in chosen]
            x = [len(v) - 1 if attribute == "paths" else v / unit for v in values]
            y = [median(runs[_key(point, case)], key) / scale for point in chosen]
            (dots,) = axis.plot(x, y, "o", ms=4, label=case.name)
            slope, intercept = np.polyfit(x, y, 1)
            axis.axline((0, intercept), slope=slope, color=dots.get_color(), lw=1)
        axis.set(
            xlabel=label,
            ylabel="seconds" if key == "seconds" else "peak memory, GB",
            ylim=(0, None),
        )
        axis.set_xlim(0, None)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _key(point: Point, case: Case) -> str:
    return f"{case.name}, {point.label}"


@click.command()
@click.option("--rounds", default=3, show_default=True, help="in which methods take turns")
@click.option("--memory", default="/dev/shm", show_default=True, help="memory-backed folder")
def main(rounds: int, memory: str) -> None:
    """Time merges of growing size, print a table and draw it."""
    cases = [replace(case, options={"out_shard_size": OUT_SHARD_SIZE}) for case in CASES]
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        all_points = points(Path(directory))
        actions = {
            _key(point, case): partial(case.run, point.paths, "bfloat16")
            for point in all_points
            for case in cases
        }
        runs = interleaved(actions, rounds, "growing", warm_up=0)
    text = (
        f"# The cost of a merge as it grows\n\nLlamas of width {WIDTH} in bfloat16, files in "
        f"memory, {rounds} interleaved round(s), medians of seconds and\nof peak memory in GB, "
        f"that of Python and its libraries included; {described()}.\nWritten by "
        f"`python -m benchmarks.scaling`.\n\n{report(all_points, runs)}"
    )
    print(text)
    write_measured("scaling.md", text)
    write_raw("scaling.json", runs)
    draw(all_points, runs, RESULTS / "speed.png")


if __name__ == "__main__":
    main()
