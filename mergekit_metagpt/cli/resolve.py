"""``mergekit-metagpt resolve``: the same merge for a machine without this package."""

from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import forecasts
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.report.stock_config import stock_config


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="-",
    help="Write to this file instead of standard output.",
)
@_shared.ray_option
def resolve(config: str, output: Path, ray: str | None, merge_options: MergeOptions) -> None:
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
    (forecast,) = forecasts(config, merge_options, numbers_only=True, ray=ray, warn=_shared.warn)
    with _shared.whole(output) as path, click.open_file(path, "wb") as file:
        file.write(stock_config(forecast).encode())
