"""Commands that take MergeKit's own options and end in one sentence when something is wrong."""

import logging
import textwrap
import traceback
from itertools import chain
from typing import Any

import click
import torch
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions

from mergekit_metagpt.mergekit_private import (
    DTYPE_LOGGER,
    MERGE_LOGGER,
    is_about_dtype,
    merge_options,
)
from mergekit_metagpt.wording import BadInputError

_PACKAGE = __name__.partition(".")[0]
_ISSUES = "https://github.com/mergekit-metagpt/mergekit-metagpt/issues"
_LONGEST = 500  # characters of a message that other libraries wrote


class MergeCommand(click.Command):
    """A command that also takes every option of MergeKit, as ``mergekit-yaml`` does.

    Its function gets them as ``merge_options``, of MergeKit's own class. If it raises an
    exception, the user sees one sentence, or with ``--verbose`` the traceback. An exception that
    nobody has foreseen is shown with what was being done.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._collect, self._merge_options = merge_options(dict)
        for option in self._merge_options:
            if option.name == "out_shard_size":
                option.type = click.types.convert_type(size)
        verbose = click.Option(["--verbose"], is_flag=True, help="Show the traceback of a failure.")
        self.params += [verbose, *self._merge_options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the command's own options, and MergeKit's below them."""
        own = [option for option in self.get_params(ctx) if option not in self._merge_options]
        for title, shown in (("Options", own), ("MergeKit's options", self._merge_options)):
            records = [parameter.get_help_record(ctx) for parameter in shown]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with ``merge_options``."""
        verbose = ctx.params.pop("verbose")
        logging.getLogger(DTYPE_LOGGER).addFilter(_without_dtype)
        if not verbose:
            logging.getLogger(MERGE_LOGGER).addFilter(_without_traceback)
        try:
            ctx.params = self._collect(**ctx.params)
            _require_device(ctx.params["merge_options"])
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if verbose:
                raise
            raise click.ClickException(_told(error) or self._failure(ctx, error)) from error

    def _failure(self, ctx: click.Context, error: Exception) -> str:
        """Say what was being done when something failed that nobody has foreseen."""
        given = [ctx.params.get(p.name) for p in self.params if isinstance(p, click.Argument)]
        values = [value if isinstance(value, tuple) else (value,) for value in given if value]
        command = " ".join(map(str, (ctx.command_path, *chain(*values))))
        if isinstance(error, OSError) and error.strerror:
            of = f": {error.filename}" if error.filename else ""
            return f"{command} failed ({error.strerror}{of}); correct that, and run it again."
        why = textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST).rstrip(".: ")
        return (
            f"{command} failed ({why}); run it again with --verbose for the traceback, and if "
            f"that does not help, report it at {_ISSUES}."
        )


def _told(error: Exception) -> str | None:
    """Return the text of an exception that this package wrote for the user, or None."""
    said = " ".join(str(error).split())
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    own = frame.f_globals.get("__name__", "").startswith(f"{_PACKAGE}.")
    whole = said.endswith(".") or "pip install" in said or isinstance(error, ConnectionError)
    return said if isinstance(error, BadInputError) or (own and whole) else None


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback of a log record, for instance if the tokenizer could not be copied."""
    record.exc_info = None
    return True


def _without_dtype(record: logging.LogRecord) -> bool:
    """Drop the message about ``torch_dtype``: MergeKit causes it, not the user."""
    return not is_about_dtype(record)


def _require_device(options: MergeOptions) -> None:
    if options.multi_gpu and not torch.accelerator.device_count():
        raise click.ClickException("There is no GPU here; leave --multi-gpu out.")
    kind = torch.device(options.device or "cpu").type
    module = getattr(torch, kind, None)
    if kind != "cpu" and not (module is not None and module.is_available()):
        raise click.ClickException(f"There is no {kind} device here; use --device cpu.")


def size(text: str | int) -> int:
    """Read a size as MergeKit does; its own type raises Python's errors."""
    try:
        return int(parse_kmb(text))
    except (ValueError, IndexError):
        raise click.BadParameter(
            f"{text!r} is not a size; write one such as 5B, 500M or 100K."
        ) from None
