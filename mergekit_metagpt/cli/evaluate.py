"""``mergekit-metagpt evaluate``: score a merge beside its base and its experts."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt.cli._config import config_argument, wants_progress
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import console

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions
    from rich.table import Table

    from mergekit_metagpt.evaluation.bench import Bench
    from mergekit_metagpt.evaluation.scoreboard import Scoreboard


@click.command(cls=MergeCommand)
@config_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--tasks",
    required=True,
    metavar="TASK[,...]",
    help="Tasks or groups of lm-eval.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task; all by default.")
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    help="Solved examples before each question; the task's own number by default.",
)
@click.option(
    "--batch-size",
    default="1",
    show_default=True,
    metavar="N",
    help="Sequences at a time; auto finds the most that fit.",
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    metavar="DIR",
    help="A folder with YAML tasks of your own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def evaluate(
    config: str,
    out: Path,
    tasks: str,
    limit: int | None,
    shots: int | None,
    batch_size: str,
    include_path: Path | None,
    as_json: bool,
    merge_options: "MergeOptions",
) -> None:
    """Score OUT, the merge of CONFIG, with lm-eval, beside its base and its experts.

    The results are kept in OUT.scores, as lm_eval writes them. What is there already is not
    measured again. Needs lm-eval: pip install 'mergekit-metagpt[evaluate]'.

    \b
    Example:
      mergekit-metagpt evaluate metagpt.yml merged/ --tasks arc_easy,gsm8k --limit 100
    """
    import json

    if find_spec("lm_eval") is None:
        raise click.ClickException(
            "Scoring needs lm-eval; run: pip install 'mergekit-metagpt[evaluate]'"
        )
    if batch_size != "auto" and not batch_size.isdecimal():
        raise click.BadParameter(f"{batch_size!r} is no number.", param_hint="--batch-size")
    from mergekit_metagpt.evaluation.bench import Bench
    from mergekit_metagpt.evaluation.scoreboard import Column, Scoreboard

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    models = _models(config, out, merge_options)
    bench = Bench(
        folder=out.absolute().with_name(f"{out.absolute().name}.scores"),
        tasks=list(dict.fromkeys(filter(None, tasks.split(",")))),
        task_folder=include_path,
        shots=shots,
        limit=limit,
        batch_size=batch_size,
        device=merge_options.device or "cpu",
        trust_remote_code=merge_options.trust_remote_code,
        progress=wants_progress(merge_options),
    )
    _score(bench, models, merge_options.quiet)
    kept = {name: bench.kept(model) for name, model in models.items()}
    experts = [name for name in models if name.startswith("expert ")]
    board = Scoreboard(
        [
            Column.of(task, {name: found[task][1] for name, found in kept.items()}, experts)
            for task in bench.tasks
        ]
    )
    files = sorted({str(file) for file, _ in kept["merge"].values()})
    if as_json:
        click.echo(json.dumps(_as_json(board, list(models), files)))
        return
    console().print(_table(board, list(models)))
    for file in files:
        click.echo(f"The scores of the merge are in {file}.")


def _models(config: str, out: Path, options: "MergeOptions") -> "dict[str, ModelReference]":
    """Return the base, the experts and the merge, in this order, by the names of their rows."""
    from mergekit.common import ModelPath, ModelReference
    from mergekit.io.tasks import LoaderCache

    from mergekit_metagpt.names import short_names
    from mergekit_metagpt.planning.config import base_and_experts, read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.planning.models import require_models
    from mergekit_metagpt.wording import BadInputError

    parsed = read_config(config).parse()
    options = with_fresh_lora_cache(options, parsed)
    LoaderCache().setup(options)
    base, experts = base_and_experts(parsed)
    require_models((base, *experts), options)
    if not (out / "config.json").exists():
        raise BadInputError(
            f"There is no merge in {out}; run mergekit-metagpt merge {config} {out} first."
        )
    merge = ModelReference(model=ModelPath(path=str(out.absolute())))
    named = zip(short_names(experts), experts, strict=True)
    return {"base": base, **{f"expert {name}": it for name, it in named}, "merge": merge}


def _score(bench: "Bench", models: "Mapping[str, ModelReference]", quiet: bool) -> None:
    """Score the models that have not been scored yet."""
    missing = {name: model for name, model in models.items() if bench.missing(model)}
    if missing:
        bench.require_tasks()
    for name, model in missing.items():
        if not quiet:
            click.echo(f"Scoring {name}", err=True)
        bench.score(model)


def _table(board: "Scoreboard", models: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE,
        caption="* the best expert on this task: Nor. Avg and ALD compare with it",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for column in board.columns:
        arrow = "" if column.higher_is_better else " ↓"
        metric = column.metric.removesuffix(",none")
        table.add_column(f"{column.task}\n{metric}{arrow}", justify="right", overflow="fold")
    averages = []
    if any(column.higher_is_better for column in board.columns):
        averages += [("Abs. Avg", board.absolute_average, ".4f")]
        averages += [("Nor. Avg", board.normalized_average, ".3f")]
    if any(column.best.loss is not None for column in board.columns):
        averages += [("ALD, nats", board.loss_difference, ".3f")]
    for title, _, _ in averages:
        table.add_column(title, justify="right")
    for model in models:
        cells = [
            f"{column.scores[model].value:.4f}{'*' if model == column.expert else ' '}"
            for column in board.columns
        ]
        figures = [(of(model), digits) for _, of, digits in averages]
        cells += ["n/a" if math.isnan(it) else f"{it:{digits}}" for it, digits in figures]
        table.add_row(Text(model), *cells)
    return table


def _as_json(board: "Scoreboard", models: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "tasks": [
            {
                "task": column.task,
                "metric": column.metric,
                "higher_is_better": column.higher_is_better,
                "expert": column.expert,
            }
            for column in board.columns
        ],
        "models": [
            {
                "model": model,
                "scores": [number(column.scores[model].value) for column in board.columns],
                "losses": [column.scores[model].loss for column in board.columns],
                "absolute_average": number(board.absolute_average(model)),
                "normalized_average": number(board.normalized_average(model)),
                "average_loss_difference": number(board.loss_difference(model)),
            }
            for model in models
        ],
        "results": list(files),
    }
