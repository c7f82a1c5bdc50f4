"""``mergekit-metagpt evaluate``: score a merge beside its base and its experts."""

import json
from importlib.util import find_spec
from pathlib import Path

import click
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions

from mergekit_metagpt.cli import _common
from mergekit_metagpt.cli._command import MergeCommand
from mergekit_metagpt.evaluation.averages import Column, averages
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.config import read_config
from mergekit_metagpt.planning.job import running
from mergekit_metagpt.planning.models import require_models
from mergekit_metagpt.report.tables import table
from mergekit_metagpt.wording import BadInputError

_AVERAGES = {  # their titles and digits, by their keys in JSON
    "absolute_average": ("Abs. Avg", 4),
    "normalized_average": ("Nor. Avg", 3),
    "average_loss_difference": ("ALD, nats", 3),
}


@click.command(cls=MergeCommand)
@_common.config_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="TASK[,...]", help="Tasks or groups of lm-eval.")
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
@_common.json_option
def evaluate(
    config: str,
    out: Path,
    tasks: str,
    limit: int | None,
    shots: int | None,
    batch_size: str,
    include_path: Path | None,
    as_json: bool,
    merge_options: MergeOptions,
) -> None:
    """Score OUT, the merge of CONFIG, with lm-eval, beside its base and its experts.

    The results are kept in OUT.scores, as lm_eval writes them. What is there already is not
    measured again. Needs lm-eval: pip install 'mergekit-metagpt[evaluate]'.

    \b
    Example:
      mergekit-metagpt evaluate metagpt.yml merged/ --tasks arc_easy,gsm8k --limit 100
    """
    if find_spec("lm_eval") is None:
        raise click.ClickException(
            "Scoring needs lm-eval; run: pip install 'mergekit-metagpt[evaluate]'"
        )
    if batch_size != "auto" and not batch_size.isdecimal():
        raise click.BadParameter(f"{batch_size!r} is no number.", param_hint="--batch-size")
    from mergekit_metagpt.evaluation.bench import Bench  # which needs lm-eval

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    with running(read_config(config), merge_options, _common.wants_progress(merge_options)) as job:
        base, experts = job.base_and_experts
        require_models((base, *experts), job.options)
        if not (out / "config.json").exists():
            raise BadInputError(
                f"There is no merge in {out}; run mergekit-metagpt merge {config} {out} first."
            )
        out = out.absolute()
        names = [f"expert {name}" for name in short_names(experts)]
        models = {"base": base, **dict(zip(names, experts, strict=True))}
        models["merge"] = ModelReference(model=ModelPath(path=str(out)))
        bench = Bench(
            folder=out.with_name(f"{out.name}.scores"),
            tasks=list(dict.fromkeys(filter(None, tasks.split(",")))),
            task_folder=include_path,
            deciding={"shots": shots, "limit": limit},
            hardware={"batch_size": batch_size, "device": merge_options.device or "cpu"},
            model_args={"trust_remote_code": True} if merge_options.trust_remote_code else {},
            progress=job.progress,
        )
        for name, model in models.items():
            if bench.missing(model):
                if not merge_options.quiet:
                    click.echo(f"Scoring {name}", err=True)
                bench.score(model)
        scored = {name: bench.results(model) for name, model in models.items()}
    columns = [
        Column.of(task, {name: own[task][1] for name, own in scored.items()}, names)
        for task in bench.tasks
    ]
    files = sorted({str(scored["merge"][task][0]) for task in bench.tasks})
    figures = {name: averages(columns, name) for name in models}
    if as_json:
        click.echo(json.dumps(_as_json(columns, figures, files)))
        return
    _show(columns, figures)
    for file in files:
        click.echo(f"The scores of the merge are in {file}.")


Figures = dict[str, dict[str, float | None]]  # averages by model


def _as_json(columns: list[Column], figures: Figures, files: list[str]) -> dict[str, object]:
    shown = ("task", "metric", "higher_is_better", "expert")
    return {
        "tasks": [{key: getattr(column, key) for key in shown} for column in columns],
        "models": [
            {
                "model": name,
                "scores": [column.scores[name] for column in columns],
                "losses": [column.losses[name] for column in columns],
                **own,
            }
            for name, own in figures.items()
        ],
        "results": files,
    }


def _show(columns: list[Column], figures: Figures) -> None:
    """Print a row for each model."""
    cells = {"model": list(figures)}
    for column in columns:
        arrow = "" if column.higher_is_better else " ↓"
        cells[f"{column.task}\n{column.metric.removesuffix(',none')}{arrow}"] = [
            f"{column.scores[name]:.4f}{'*' if name == column.expert else ' '}" for name in figures
        ]
    for key, (title, digits) in _AVERAGES.items():
        values = [own[key] for own in figures.values()]
        cells[title] = ["n/a" if value is None else f"{value:.{digits}f}" for value in values]
    _common.console().print(table(cells))
    click.echo("* the best expert on this task: Nor. Avg and ALD compare with it")
