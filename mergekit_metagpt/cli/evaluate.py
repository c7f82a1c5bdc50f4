"""``mergekit-metagpt evaluate``: score a merge beside its base and its experts."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions

from mergekit_metagpt.cli import _shared
from mergekit_metagpt.evaluation.scores import Score, averages
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


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="TASK[,...]", help="Tasks or groups of lm-eval.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task; all by default.")
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    help="Solved examples before each question; the task's own number by default.",
)
@click.option("--batch-size", default="1", metavar="N", help="Sequences at a time, or auto.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    metavar="DIR",
    help="A folder with YAML tasks of your own.",
)
@_shared.json_option
def evaluate(
    config: str,
    out: Path,
    tasks: str,
    batch_size: str,
    include_path: Path | None,
    as_json: bool,
    merge_options: MergeOptions,
    **deciding: int | None,
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
    from mergekit_metagpt.evaluation.harness import Bench  # which needs lm-eval

    with running(read_config(config), merge_options) as job:
        base, experts = job.base_and_experts
        require_models((base, *experts), job.options)
        if not (out / "config.json").exists():
            raise BadInputError(
                f"There is no merge in {out}; run mergekit-metagpt merge {config} {out} first."
            )
        merge = ModelReference(model=ModelPath(path=str(out.absolute())))
        chosen = list(dict.fromkeys(filter(None, tasks.split(","))))
        run = (job.options, job.progress, Path(f"{out.absolute()}.scores"))
        bench = Bench(*run, chosen, include_path, deciding, batch_size)
        names = [f"expert {name}" for name in short_names(experts)]
        models = dict(zip(("base", *names, "merge"), (base, *experts, merge), strict=True))
        scored = {name: bench.score(name, model) for name, model in models.items()}
    report = _report(scored, {t: max(names, key=lambda it: scored[it][t].rank) for t in chosen})
    if as_json:
        click.echo(json.dumps(report))
        return
    _shared.console().print(table(_cells(report)))
    click.echo("* the best expert on this task: Nor. Avg and ALD compare with it")
    for file in report["results"]:
        click.echo(f"The scores of the merge are in {file}.")


def _report(scored: Mapping[str, Mapping[str, Score]], best: Mapping[str, str]) -> dict[str, Any]:
    """Return scores by model and task, and the best expert of each task, as JSON types."""
    tasks = []
    for task, expert in best.items():
        its = scored[expert][task]
        judged = {"metric": its.metric, "higher_is_better": its.higher_is_better}
        tasks.append({"task": task, **judged, "expert": expert})
    models = [
        {
            "model": name,
            "scores": [scores[task].value for task in best],
            "losses": [scores[task].loss for task in best],
            **averages([(scores[task], scored[expert][task]) for task, expert in best.items()]),
        }
        for name, scores in scored.items()
    ]
    files = sorted({str(score.file) for score in scored["merge"].values()})
    return {"tasks": tasks, "models": models, "results": files}


def _cells(report: dict[str, Any]) -> dict[str, list[str]]:
    """Return a report as columns, a row for each model."""
    models = report["models"]
    cells = {"model": [model["model"] for model in models]}
    for number, task in enumerate(report["tasks"]):
        arrow = "" if task["higher_is_better"] else " ↓"
        cells[f"{task['task']}\n{task['metric'].removesuffix(',none')}{arrow}"] = [
            f"{model['scores'][number]:.4f}{'*' if model['model'] == task['expert'] else ' '}"
            for model in models
        ]
    for key, (title, digits) in _AVERAGES.items():
        cells[title] = ["n/a" if m[key] is None else f"{m[key]:.{digits}f}" for m in models]
    return cells
