"""``mergekit-metagpt resolve``: the same merge for a machine without this package."""

from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import (
    config_argument,
    forecast_config,
    ray_option,
)
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import write_text

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(cls=MergeCommand)
@config_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    default="-",
    help="Write to this file instead of standard output.",
)
@ray_option
def resolve(
    config: str,
    output: str,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Write CONFIG as stock MergeKit YAML with explicit weights.

    MergeKit merges it to the same result without this package. In float32 the bytes are the
    same, with exceptions: plain metagpt and rescaled merges differ by rounding, of equal
    magnitudes others may be kept, and DARE and DELLA draw different masks. Granularity
    direction has no such config.

    \b
    Example:
      mergekit-metagpt resolve metagpt.yml -o stock.yml
      mergekit-yaml stock.yml merged/
    """
    from mergekit_metagpt.report.stock_config import stock_config

    (forecast,) = forecast_config(config, merge_options, ray, numbers_only=True)
    write_text(output, stock_config(forecast))
