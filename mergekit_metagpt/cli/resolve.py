"""``mergekit-metagpt resolve``: the same merge for a machine without this package."""

import os
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import config_argument, forecast_config, ray_option
from mergekit_metagpt.cli._options import MergeCommand

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
def resolve(config: str, output: str, ray: str | None, merge_options: "MergeOptions") -> None:
    """Write CONFIG as stock MergeKit YAML with explicit weights.

    MergeKit merges it to the same result without this package. In float32 the bytes are the
    same, with two exceptions: plain metagpt differs by up to two rounding steps, and DARE and
    DELLA draw different masks. Granularity direction has no such config.

    \b
    Example:
      mergekit-metagpt resolve metagpt.yml -o stock.yml
      mergekit-yaml stock.yml merged/
    """
    from mergekit_metagpt.report.stock_config import stock_config

    text = stock_config(forecast_config(config, merge_options, ray, numbers_only=True))
    with click.open_file(output, "w", encoding="utf-8", atomic=_is_replaceable(output)) as file:
        file.write(text)


def _is_replaceable(output: str) -> bool:
    """Return whether a renamed file may replace the output: not a device, a pipe or a link."""
    if output == "-" or os.path.islink(output):
        return False
    return os.path.isfile(output) or not os.path.exists(output)
