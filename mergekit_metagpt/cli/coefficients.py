"""``mergekit-metagpt coefficients``: see the coefficients before you merge."""

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_metagpt.cli import _common
from mergekit_metagpt.cli._command import MergeCommand
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.report import plots, tables


@click.command(cls=MergeCommand)
@_common.config_argument
@click.option(
    "--granularity",
    type=click.Choice(list(GRANULARITIES)),
    help="Use this granularity instead of the config's.",
)
@_common.json_option
@_common.plot_option("coefficients, coefficients by layer and cosines")
@_common.ray_option
def coefficients(
    config: str,
    granularity: str | None,
    as_json: bool,
    plot: Path | None,
    ray: str | None,
    merge_options: MergeOptions,
) -> None:
    """Measure the task vectors of CONFIG and print the coefficients its merge will use.

    Reads the checkpoints once, unless it has measured them before, and merges nothing.

    \b
    Example:
      mergekit-metagpt coefficients metagpt.yml --granularity layer --plot coefficients.png
    """
    plots.require_plotting(plot)
    (forecast,) = _common.forecast_config(config, merge_options, ray, [granularity])
    if as_json:
        click.echo(json.dumps(tables.as_json(forecast)))
    else:
        _common.console().print(tables.forecast_tables(forecast))
    _common.warn(tables.forecast_warnings(forecast))
    if plot is not None:
        figure = plots.coefficients_figure(
            forecast.method.spec.name, forecast.base, forecast.summary, forecast.survey.cosines
        )
        _common.save_figure(figure, plot)
