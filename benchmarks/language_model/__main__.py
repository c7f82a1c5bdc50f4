"""The command `python -m benchmarks.language_model`."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path

import click
import torch
import transformers

from benchmarks.language_model.ablation import DEFAULT, Ablation, ablation_table
from benchmarks.language_model.base import PACKAGED, make_base
from benchmarks.language_model.bench import Bench, Items
from benchmarks.language_model.experts import RECIPES
from benchmarks.language_model.measure import FamilyBench, LanguageFamily
from benchmarks.language_model.report import report
from benchmarks.language_model.rows import rows_of
from benchmarks.language_model.tasks import DEFINITIONS
from benchmarks.language_model.whole import write_json
from benchmarks.machine import described
from benchmarks.results_file import write_measured, write_raw

SEEDS = 2
QUICK_TASKS = ("film", "category", "arithmetic")
# It has these tasks only, and fewer merges than other recipes.
QUICK_RECIPE = "even, 3 experts"


@click.command()
@click.option("--quick", is_flag=True, help="Three tasks, one family; prints, and writes nothing.")
@click.option("--ablation", is_flag=True, help="Only the table of variants.")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    type=click.Choice(list(RECIPES)),
    help="Only families of this recipe; writes nothing. May be repeated, as --seed.",
)
@click.option("--seed", "seeds", multiple=True, type=int, help="Only families of this seed.")
@click.option(
    "--work",
    default="language-model",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
    help="Where data, experts (28 GB) and scores go.",
)
@click.option(
    "--base",
    default=PACKAGED,
    show_default=True,
    metavar="MODEL",
    help="Another causal language model: a name on the hub, or a directory.",
)
def main(
    quick: bool,
    ablation: bool,
    recipes: tuple[str, ...],
    seeds: tuple[int, ...],
    work: Path,
    base: str,
) -> None:
    """Train experts of a language model, merge them in every way, and score the merges.

    All is fetched, trained and scored in DIR. After an interruption, the same command continues
    where it stopped. A GPU is used if there is one. Writes benchmarks/results/language_model.md
    and .json, and updates both after each family; then ablation.md, the table of variants.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _require_same_base(work, base)
    make_base(base, work / "base")
    tasks = QUICK_TASKS if quick else tuple(DEFINITIONS)
    bench = Bench(work, {task: DEFINITIONS[task] for task in tasks}, Items())
    planned = product(
        seeds or range(1 if quick else SEEDS), recipes or ([QUICK_RECIPE] if quick else RECIPES)
    )
    families = [(recipe, seed) for seed, recipe in planned]
    writes = not (quick or recipes or seeds)
    texts = {}
    if not ablation:
        texts["language_model.md"] = _compared(bench, families, Path(base).name, writes)
    if ablation or not quick:
        texts["ablation.md"] = _ablation(bench, families)
    for name, text in texts.items():
        if writes:
            write_measured(name, text)
        click.echo(text)


def _compared(bench: Bench, planned: list[tuple[str, int]], name: str, writes: bool) -> str:
    """Measure all merges of the families; return the report."""
    start = time.perf_counter()
    families: list[LanguageFamily] = []
    for recipe, seed in planned:
        families.append(FamilyBench(bench, recipe, seed).results(name, rows_of(recipe)))
        minutes = (time.perf_counter() - start) / 60
        click.echo(f"{minutes:5.1f} min  {recipe}, seed {seed}: done", err=True)
        text = f"{_report(families)}\n\n{_circumstances(bench.device)}"
        if writes:
            so_far = f"**{len(families)} of {len(planned)} families so far.**"
            write_raw("language_model.json", [asdict(family) for family in families])
            write_measured("language_model.md", f"{so_far}\n\n{text}")
    return text


def _report(families: list[LanguageFamily]) -> str:
    rows = (row for family in families for row in rows_of(family.recipe))
    ours = dict.fromkeys(row.name for row in rows if row.method == "metagpt")
    return report(families, ours)


def _ablation(bench: Bench, families: Iterable[tuple[str, int]]) -> str:
    """Measure the variants of `direction` that are missing; return their table."""
    losses = {}
    for recipe, seed in families:
        losses[recipe, seed] = Ablation(FamilyBench(bench, recipe, seed)).losses()
        click.echo(f"ablation of {recipe}, seed {seed}: done", err=True)
    return (
        f"# Variants of `granularity: direction`\n\n"
        f"Each is one change away from {DEFAULT}. Regret: how far its loss on the validation "
        f"examples is above the least of the family's rows here, in nats; seeds are divided by "
        f"a dot. The first seed chooses the rule with the least worst regret, the next one "
        f"confirms it.\n\n{ablation_table(losses)}\n\n{_circumstances(bench.device)}"
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
