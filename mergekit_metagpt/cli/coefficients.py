"""``mergekit-metagpt coefficients``: see the coefficients before you merge."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import (
    config_argument,
    mapper,
    ray_option,
    read_config,
    wants_progress,
)
from mergekit_metagpt.cli._options import MergeCommand

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(cls=MergeCommand)
@config_argument
@click.option(
    "--granularity",
    type=click.Choice(["tensor", "layer", "model"]),
    help="Use this scope in place of the config's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw coefficients, shares by layer and cosines, such as FILE.png.",
)
@ray_option
def coefficients(
    config: str,
    granularity: str | None,
    as_json: bool,
    plot: Path | None,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Measure the task vectors of CONFIG and print the coefficients its merge will use.

    Reads the checkpoints once and merges nothing.

    \b
    Example:
      mergekit-metagpt coefficients metagpt.yml --granularity layer --plot coefficients.png
    """
    import json

    from rich.console import Console

    from mergekit_metagpt import plots, report
    from mergekit_metagpt.plan import plan_merge

    if plot is not None:
        plots.require_plotting(plot)
    plan = plan_merge(
        read_config(config),
        merge_options,
        granularity=granularity,
        progress=wants_progress(merge_options),
        mapper=mapper(ray, merge_options),
    )
    if as_json:
        click.echo(json.dumps(report.as_json(plan)))
    else:
        Console().print(report.tables(plan))
    for warning in report.warnings(plan):
        click.secho(f"Warning: {warning}", fg="yellow", err=True)
    if plot is not None:
        plots.draw_coefficients(
            plot,
            report.short_names([str(expert) for expert in plan.experts]),
            plan.coefficients,
            report.layer_shares(plan),
            plan.survey.cosines,
        )
