"""``mergekit-metagpt coefficients``: see the coefficients before you merge."""

import json
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import forecasts
from mergekit_metagpt.api.results import Plan
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.core.granularities import GRANULARITIES


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.option(
    "--granularity",
    type=click.Choice(list(GRANULARITIES)),
    help="Use this granularity instead of the config's.",
)
@_shared.json_option
@_shared.plot_option("coefficients, coefficients by layer and cosines")
@_shared.ray_option
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
    plan = Plan(*forecasts(config, merge_options, [granularity], ray=ray, warn=_shared.warn))
    if as_json:
        click.echo(json.dumps(plan.as_json()))
    else:
        title, _, shown = plan.shown()
        _shared.console().print(title, "", shown, sep="\n")
    _shared.warn(plan.warnings)
    if plot is not None:
        with _shared.whole(plot) as path:
            plan.plot().savefig(path)
