"""What the commands share: MergeKit's options, how one fails, and what is printed and written."""

import logging
import os
import shutil
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions, PrettyPrintHelp
from rich.console import Console

from mergekit_metagpt.mergekit_private import MERGE_LOGGER, add_merge_options
from mergekit_metagpt.report.plots import require_plotting
from mergekit_metagpt.wording import BadInputError

_PACKAGE = __name__.partition(".")[0]
_ISSUES = "https://github.com/mergekit-metagpt/mergekit-metagpt/issues"
_LONGEST = 500  # characters of a message that other libraries wrote

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
    """Return the option ``--plot``; a file that cannot be written is refused before the work."""
    return click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} to this file, such as FILE.png.",
    )


def size(text: str | int) -> int:
    """Read a size as MergeKit does, or say how to write one."""
    try:
        return int(parse_kmb(text))
    except (ValueError, IndexError):
        raise click.BadParameter(
            f"{text!r} is not a size; write one such as 5B, 500M or 100K."
        ) from None


# Types for some of MergeKit's options, by name: its own let through values that fail later, or
# show an exception of Python.
_TYPES = {
    "out_shard_size": size,
    "num_threads": click.IntRange(1),
    "write_threads": click.IntRange(1),
    "random_seed": click.IntRange(0, 2**32 - 1),
}


class MergeCommand(PrettyPrintHelp):
    """A command that also takes every option of MergeKit, as ``mergekit-yaml`` does.

    Its function gets them as ``merge_options``, of MergeKit's own class. If it raises an
    exception, the user sees one sentence, or with ``--verbose`` the traceback.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        mergekits = click.command()(add_merge_options(dict))
        self._collect: Any = mergekits.callback
        for option in mergekits.params:
            option.type = click.types.convert_type(_TYPES.get(str(option.name), option.type))
        verbose = click.Option(["--verbose"], is_flag=True, help="Show the traceback of a failure.")
        self.params += [verbose, *mergekits.params]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with ``merge_options``."""
        verbose = ctx.params.pop("verbose")
        # It complains of torch_dtype, which MergeKit, not the user, has written.
        logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
        if not verbose:
            logging.getLogger(MERGE_LOGGER).addFilter(_without_traceback)
        try:
            ctx.params = self._collect(**ctx.params)
            options = ctx.params["merge_options"]
            _require_device(options)
            options.apply_global_options()
            require_plotting(ctx.params.get("plot"))
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if verbose:
                raise
            raise click.ClickException(_explained(error, ctx.command_path)) from error


def _explained(error: Exception, command: str) -> str:
    """Return what this package wrote for the user, or else say what failed."""
    if isinstance(error, BadInputError):
        return "\nError: ".join(error.args)
    said = " ".join(str(error).split())
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    own = frame.f_globals.get("__name__", "").startswith(f"{_PACKAGE}.")
    whole = said.endswith(".") or "pip install" in said or isinstance(error, ConnectionError)
    if own and whole:
        return said
    if isinstance(error, OSError) and error.strerror:
        of = f": {error.filename}" if error.filename else ""
        return f"{command} failed ({error.strerror}{of}); correct that, and run it again."
    why = textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST).rstrip(".: ")
    return (
        f"{command} failed ({why}); run it again with --verbose for the traceback, and if that "
        f"does not help, report it at {_ISSUES}."
    )


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback of a log record, for instance if the tokenizer could not be copied."""
    record.exc_info = None
    return True


def _require_device(options: MergeOptions) -> None:
    if options.multi_gpu and not torch.accelerator.device_count():
        raise click.ClickException("There is no GPU here; leave --multi-gpu out.")
    device = options.device or "cpu"
    try:
        kind = torch.device(device).type
        is_here = kind == "cpu" or getattr(torch, kind).is_available()
    except (RuntimeError, AttributeError):  # no such kind, or no such number
        kind, is_here = device, False
    if not is_here:
        raise click.ClickException(f"There is no {kind} device here; use --device cpu.")


def console() -> Console:
    """Return rich's console for standard output; it prints model names unchanged."""
    return Console(markup=False, emoji=False, highlight=False)


def warn(sentences: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for sentence in sentences:
        click.secho(f"Warning: {sentence}", fg="yellow", err=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` at the end, if nothing fails until then.

    A link, a device, a pipe and ``-`` stay what they are.
    """
    if str(path) == "-" or path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
