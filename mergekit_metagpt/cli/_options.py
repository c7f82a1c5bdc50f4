"""MergeKit's own options, for every command that touches models."""

import logging
import textwrap
import traceback
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import click

from mergekit_metagpt.mergekit_private import DTYPE_LOGGER, MERGE_LOGGER, is_about_dtype
from mergekit_metagpt.wording import BadInputError

_PACKAGE = __name__.partition(".")[0]
_ISSUES = "https://github.com/mergekit-metagpt/mergekit-metagpt/issues"
_KEPT = "measured models are found again by themselves, so leave it out"
_REMOVED = {
    "--survey": _KEPT,
    "--save-survey": _KEPT,
    "--keep": "leave it out; merge downloads the models",
    "--model-index": "add scores with hf's own tools, and leave it out",
    "--resume": "the same command goes on by itself, so leave it out",
}
_LONGEST = 500  # characters of a message that other libraries wrote


class MergeCommand(click.Command):
    """A command that also takes every option of MergeKit, as ``mergekit-yaml`` does.

    Its function gets them as ``merge_options``, of MergeKit's own class. Loading these options
    imports torch, which is slow. So they are loaded when the command is used, not when it is
    listed.

    If the command raises an exception, the user sees one sentence, or with ``--verbose`` the
    traceback. An exception that nobody has foreseen is shown with what was being done.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(
            click.Option(["--verbose"], is_flag=True, help="Show the traceback of a failure.")
        )

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, then those of MergeKit that it has not itself."""
        own = super().get_params(ctx)
        names = {parameter.name for parameter in own}
        return [*own, *(option for option in _merge_options()[1] if option.name not in names)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; say what to do about an option of an earlier version."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if way := _REMOVED.get(error.option_name):
                raise click.UsageError(f"{error.option_name} is gone; {way}.", ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the command's own options, and MergeKit's below them."""
        parameters, own = self.get_params(ctx), len(super().get_params(ctx))
        sections = {"Options": parameters[:own], "MergeKit's options": parameters[own:]}
        for title, shown in sections.items():
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
            collect, _ = _merge_options()
            ctx.params = collect(**ctx.params)
            _require_device(ctx.params["merge_options"].device)
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


def _require_device(name: str) -> None:
    import torch

    kind = torch.device(name).type
    module = getattr(torch, kind, None)
    if kind != "cpu" and not (module is not None and module.is_available()):
        raise click.ClickException(f"There is no {kind} device here; use --device cpu.")


@cache
def _merge_options() -> tuple[Callable[..., dict[str, Any]], list[click.Option]]:
    """Return a function that builds ``merge_options`` from parameters, and MergeKit's options."""
    from mergekit_metagpt.mergekit_private import merge_options

    def collect(**parameters: Any) -> dict[str, Any]:
        return parameters

    function, options = merge_options(collect)
    for option in options:
        if option.name == "out_shard_size":
            option.type = _Size(option.type)
    return function, options


class _Size(click.ParamType):  # type: ignore[type-arg]
    """MergeKit's type of a size, with a clear message: MergeKit's own raises Python's errors."""

    name = "size"

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a size in bytes."""
        try:
            return self._reader.convert(value, param, ctx)
        except (ValueError, IndexError):
            self.fail(f"{value!r} is not a size; write one such as 5B, 500M or 100K.", param, ctx)
