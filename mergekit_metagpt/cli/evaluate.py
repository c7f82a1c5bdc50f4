"""``mergekit-metagpt evaluate``: score a merge beside its base and its experts."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import config_argument, wants_progress
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import console

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

_AVERAGES = {  # their titles and digits, by their keys in JSON
    "absolute_average": ("Abs. Avg", 4),
    "normalized_average": ("Nor. Avg", 3),
    "average_loss_difference": ("ALD, nats", 3),
}


@click.command(cls=MergeCommand)
@config_argument
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
    from mergekit_metagpt.evaluation.averages import Column, averages
    from mergekit_metagpt.evaluation.bench import Bench

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    models = _models(config, out, merge_options)
    bench = Bench(
        folder=out.absolute().with_name(f"{out.absolute().name}.scores"),
        tasks=list(dict.fromkeys(filter(None, tasks.split(",")))),
        task_folder=include_path,
        deciding={"shots": shots, "limit": limit},
        hardware={"batch_size": batch_size, "device": merge_options.device or "cpu"},
        model_args={"trust_remote_code": True} if merge_options.trust_remote_code else {},
        progress=wants_progress(merge_options),
    )
    for name, model in models.items():
        if bench.missing(model):
            if not merge_options.quiet:
                click.echo(f"Scoring {name}", err=True)
            bench.score(model)
    scored = {name: bench.results(model) for name, model in models.items()}
    experts = [name for name in models if name.startswith("expert ")]
    columns = [
        Column.of(task, {name: own[task][1] for name, own in scored.items()}, experts)
        for task in bench.tasks
    ]
    files = sorted({str(scored["merge"][task][0]) for task in bench.tasks})
    if as_json:
        shown = ("task", "metric", "higher_is_better", "expert")
        report = {
            "tasks": [{key: getattr(column, key) for key in shown} for column in columns],
            "models": [
                {
                    "model": name,
                    "scores": [column.scores[name] for column in columns],
                    "losses": [column.losses[name] for column in columns],
                    **averages(columns, name),
                }
                for name in models
            ],
            "results": files,
        }
        click.echo(json.dumps(report))
        return
    from mergekit_metagpt.report.tables import table

    cells: dict[str, list[str]] = {"model": list(models)}
    for column in columns:
        arrow = "" if column.higher_is_better else " ↓"
        cells[f"{column.task}\n{column.metric.removesuffix(',none')}{arrow}"] = [
            f"{column.scores[name]:.4f}{'*' if name == column.expert else ' '}" for name in models
        ]
    for key, (title, digits) in _AVERAGES.items():
        figures = [averages(columns, name)[key] for name in models]
        cells[title] = ["n/a" if it is None else f"{it:.{digits}f}" for it in figures]
    console().print(table(cells))
    click.echo("* the best expert on this task: Nor. Avg and ALD compare with it")
    for file in files:
        click.echo(f"The scores of the merge are in {file}.")


def _models(config: str, out: Path, options: "MergeOptions") -> "Mapping[str, ModelReference]":
    """Return the base, the experts and the merge, in this order, by the names of their rows."""
    from mergekit.common import ModelPath, ModelReference
    from mergekit.io.tasks import LoaderCache

    from mergekit_metagpt.names import short_names
    from mergekit_metagpt.planning.config import base_and_experts, read_config
    from mergekit_metagpt.planning.job import with_own_adapters
    from mergekit_metagpt.planning.models import require_models
    from mergekit_metagpt.wording import BadInputError

    parsed = read_config(config).parse()
    options = with_own_adapters(options, parsed)
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
