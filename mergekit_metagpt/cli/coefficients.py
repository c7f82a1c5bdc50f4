"""``mergekit-metagpt coefficients``: see the coefficients before you merge."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import (
    config_argument,
    forecast_config,
    ray_option,
    warn,
)
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.core.granularities import GRANULARITIES

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(cls=MergeCommand)
@config_argument
@click.option(
    "--granularity",
    type=click.Choice(list(GRANULARITIES)),
    help="Use this granularity instead of the config's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw coefficients, coefficients by layer and cosines to this file, such as FILE.png.",
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

    Reads the checkpoints once, unless it has measured them before, and merges nothing.

    \b
    Example:
      mergekit-metagpt coefficients metagpt.yml --granularity layer --plot coefficients.png
    """
    import json

    from mergekit_metagpt.cli._output import console, save_figure
    from mergekit_metagpt.report import plots, tables

    if plot is not None:
        plots.require_plotting(plot)
    (forecast,) = forecast_config(config, merge_options, ray, [granularity])
    if as_json:
        click.echo(json.dumps(tables.as_json(forecast)))
    else:
        console().print(tables.forecast_tables(forecast))
    warn(tables.forecast_warnings(forecast))
    if plot is not None:
        figure = plots.coefficients_figure(
            forecast.method.spec.name, forecast.base, forecast.summary, forecast.survey.cosines
        )
        save_figure(figure, plot)
