"""The command `python -m benchmarks.quality`."""

import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import click
import torch
import transformers

from benchmarks.machine import described
from benchmarks.quality.families import Family
from benchmarks.quality.measure import measure_families
from benchmarks.quality.models import Size
from benchmarks.quality.picture import draw
from benchmarks.quality.report import report
from benchmarks.results_file import RESULTS, write_measured, write_raw

SIZES = {
    "small": Size(hidden_size=96, layers=3, base_steps=600, base_rate=2e-3, expert_steps=200),
    "large": Size(hidden_size=192, layers=4, base_steps=550, base_rate=1e-3, expert_steps=200),
}
SEEDS = 3

QUICK_SIZES = {"small": SIZES["small"]}
QUICK_SEEDS = 1


@click.command()
@click.option("--quick", is_flag=True, help="One size and one seed; prints, and writes nothing.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
def main(quick: bool, device: str) -> None:
    """Train bases and experts, merge them in every way, and score the merges with lm-eval.

    Writes benchmarks/results/quality.md, .json and .png. The .json is updated after each family.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # With one thread, the figures do not depend on the number of cores. It also avoids waiting:
    # on a busy machine, threads that wait for each other took 20 times as long.
    torch.set_num_threads(1)
    start = time.perf_counter()
    families: list[Family] = []
    with tempfile.TemporaryDirectory() as work:
        sizes, seeds = (QUICK_SIZES, QUICK_SEEDS) if quick else (SIZES, SEEDS)
        for family in measure_families(sizes, seeds, device, Path(work).resolve()):
            families.append(family)
            minutes = (time.perf_counter() - start) / 60
            click.echo(
                f"{minutes:5.1f} min  {family.size}, {family.recipe}, seed {family.seed}", err=True
            )
            if not quick:
                write_raw("quality.json", [asdict(family) for family in families])
    text = f"{report(families)}\n\n{_circumstances(device, minutes)}"
    if not quick:
        write_measured("quality.md", text)
        draw(families, RESULTS / "quality.png")
    click.echo(text)


def _circumstances(device: str, minutes: float) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "lm_eval"))
    return (
        f"Measured in {minutes:.0f} minutes by `python -m benchmarks.quality` with one thread\n"
        f"on {described(device)}, {versions}."
    )


if __name__ == "__main__":
    main()
