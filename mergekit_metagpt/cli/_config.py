"""The arguments that commands share: the merge config, and where the work runs."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.planning.forecast import Forecast

config_argument = click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, allow_dash=True)
)
ray_option = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Run on the Ray cluster at ADDRESS or $RAY_ADDRESS, or else on a new one on this machine. "
    "Put this option after the arguments.",
)


def wants_progress(options: "MergeOptions") -> bool:
    """Return whether progress bars are shown: on a terminal, unless ``--quiet`` is given."""
    return sys.stderr.isatty() and not options.quiet


def warn(sentences: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for sentence in sentences:
        click.secho(f"Warning: {sentence}", fg="yellow", err=True)


def forecast_config(
    config: str,
    options: "MergeOptions",
    ray: str | None,
    granularities: "Sequence[str | None]" = (None,),
    numbers_only: bool = False,
) -> "list[Forecast]":
    """Return the coefficients that the merge of a config will use, measured here or on Ray.

    Args:
        config: the path of the config, or ``-``; it is read once.
        options: MergeKit's options.
        ray: the value of ``--ray``.
        granularities: a forecast is made for each, in place of the config's unless it is None.
        numbers_only: refuse granularity direction.
    """
    from mergekit_metagpt.api.calls import forecasts
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.job import running

    options.apply_global_options()  # type: ignore[no-untyped-call]
    with running(read_config(config), options, wants_progress(options)) as job:
        return forecasts(
            job,
            granularities,
            numbers_only=numbers_only,
            ray=ray,
            warn=warn,
        )
