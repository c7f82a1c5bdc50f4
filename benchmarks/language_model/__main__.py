"""The command `python -m benchmarks.language_model`."""

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path

import click
import torch
import transformers

from benchmarks.language_model.base import PACKAGED, make_base
from benchmarks.language_model.bench import Bench, Items
from benchmarks.language_model.experts import RECIPES
from benchmarks.language_model.measure import FamilyBench, LanguageFamily
from benchmarks.language_model.report import report, sweep_table
from benchmarks.language_model.rows import (
    CHOSEN,
    DIRECTIONS,
    QUICK_ROWS,
    ROWS,
    Row,
)
from benchmarks.language_model.tasks import DEFINITIONS
from benchmarks.language_model.whole import write_json
from benchmarks.machine import described
from benchmarks.results_file import write_measured, write_raw

SEEDS = 2
# Where the parameters of `direction` are chosen; the other families confirm the choice.
CHOSEN_ON = ("even", 0)
QUICK_TASKS = ("film", "category", "arithmetic")


@click.command()
@click.option("--quick", is_flag=True, help="Three tasks, one family; prints, and writes nothing.")
@click.option(
    "--work",
    default="language-model",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    help="Where data, experts (16 GB) and scores go.",
)
@click.option(
    "--base",
    default=PACKAGED,
    show_default=True,
    metavar="MODEL",
    help="Another causal language model: a name on the hub, or a directory.",
)
def main(quick: bool, work: Path, base: str) -> None:
    """Train experts of a language model, merge them in every way, and score the merges.

    All is fetched, trained and scored in DIR. After an interruption, the same command continues
    where it stopped. A GPU is used if there is one. Writes benchmarks/results/language_model.md
    and .json, and updates both after each family.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    _require_same_base(work, base)
    make_base(base, work / "base")
    tasks = QUICK_TASKS if quick else tuple(DEFINITIONS)
    bench = Bench(work, {task: DEFINITIONS[task] for task in tasks}, Items())
    recipes, seeds, rows = (["even"], 1, QUICK_ROWS) if quick else (list(RECIPES), SEEDS, ROWS)
    sweep = [] if quick else _sweep(FamilyBench(bench, *CHOSEN_ON))
    if sweep:
        rows = [*rows, min(sweep, key=lambda pair: pair[1])[0]._replace(name=CHOSEN)]
    families: list[LanguageFamily] = []
    planned = list(product(range(seeds), recipes))
    for seed, recipe in planned:
        families.append(FamilyBench(bench, recipe, seed).results(Path(base).name, rows))
        minutes = (time.perf_counter() - start) / 60
        click.echo(f"{minutes:5.1f} min  {recipe}, seed {seed}: done", err=True)
        text = report(families, [row.name for row in rows if row.method == "metagpt"])
        if len(families) < len(planned):
            text = f"**{len(families)} of {len(planned)} families so far.**\n\n{text}"
        if sweep:
            text += "\n\n" + _choice(sweep)
        text += f"\n\n{_circumstances(bench.device)}"
        if not quick:
            write_raw("language_model.json", [asdict(family) for family in families])
            write_measured("language_model.md", text)
    click.echo(text)


def _sweep(family: FamilyBench) -> list[tuple[Row, float]]:
    """Return the ALD on validation examples of all that `direction` can be set to."""
    return [(row, family.validation_difference(row)) for row in DIRECTIONS]


def _choice(sweep: list[tuple[Row, float]]) -> str:
    recipe, seed = CHOSEN_ON
    return (
        f"### The parameters of `granularity: direction`\n\n"
        f"ALD on the validation examples of {recipe}, seed {seed}. The tables above have the test "
        f"examples; their row {CHOSEN} has the parameters in bold.\n\n"
        f"{sweep_table(sweep, ('side', 'exponent', 'isotropy'))}"
    )


def _require_same_base(work: Path, base: str) -> None:
    """Refuse to mix the experts and scores of two bases."""
    path = work / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))["base"]
        if kept != base:
            raise click.UsageError(
                f"{work} has experts of {kept}; give another --work for those of {base}."
            )
    write_json(path, {"base": base})


def _circumstances(device: str) -> str:
    threads = torch.get_num_threads()
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "lm_eval"))
    return (
        f"Measured by `python -m benchmarks.language_model` with {threads} "
        f"thread{'s' * (threads > 1)}\non {described(device)}, {versions}."
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.language_model")
