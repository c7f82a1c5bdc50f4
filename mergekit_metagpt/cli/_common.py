"""What commands have in common: arguments, where the work runs, what is printed and written."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mergekit.options import MergeOptions
from rich.console import Console

from mergekit_metagpt.api.calls import forecasts
from mergekit_metagpt.planning.config import ConfigFile, read_config
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.planning.job import Job, running

if TYPE_CHECKING:
    from matplotlib.figure import Figure

config_argument = click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, allow_dash=True)
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else."
)
ray_option = click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Run on the Ray cluster at ADDRESS or $RAY_ADDRESS, or else on a new one on this machine. "
    "Put this option after the arguments.",
)


def plot_option(what: str) -> Callable[[Any], Any]:
    """Return the option ``--plot``; the command calls ``require_plotting`` before it works."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} to this file, such as FILE.png.",
    )


def console() -> Console:
    """Return rich's console for standard output; it prints model names unchanged."""
    return Console(markup=False, emoji=False, highlight=False)


def warn(sentences: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for sentence in sentences:
        click.secho(f"Warning: {sentence}", fg="yellow", err=True)


def wants_progress(options: MergeOptions) -> bool:
    """Return whether progress bars are shown: on a terminal, unless ``--quiet`` is given."""
    return sys.stderr.isatty() and not options.quiet


@contextmanager
def job_of(config: str | ConfigFile, options: MergeOptions) -> Iterator[Job]:
    """Run a job with MergeKit's options; a config that is not read yet is given by its path."""
    options.apply_global_options()  # type: ignore[no-untyped-call]
    written = read_config(config) if isinstance(config, str) else config
    with running(written, options, wants_progress(options)) as job:
        yield job


def forecast_config(
    config: str,
    options: MergeOptions,
    ray: str | None,
    granularities: Sequence[str | None] = (None,),
    numbers_only: bool = False,
) -> list[Forecast]:
    """Return the coefficients that the merge of a config will use, measured here or on Ray.

    There is a forecast for each granularity, in place of the config's unless it is None;
    ``numbers_only`` refuses granularity direction.
    """
    with job_of(config, options) as job:
        return forecasts(job, granularities, numbers_only=numbers_only, ray=ray, warn=warn)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all; ``-`` is standard output.

    Raises:
        OSError: if it cannot be written; names ``path``.
    """
    if str(path) == "-" or path.is_symlink() or (path.exists() and not path.is_file()):
        with click.open_file(path, "wb") as stream:  # a link, a device or a pipe stays what it is
            stream.write(content)
        return
    partial_file = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        partial_file.write_bytes(content)
        if path.exists():
            shutil.copymode(path, partial_file)
        partial_file.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial_file.unlink(missing_ok=True)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure; the suffix sets the format."""
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    write_whole(path, drawn.getvalue())
