"""MergeKit's own options, for every command that touches models."""

import logging
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import click

from mergekit_metagpt.cli._mergekit_options import SHOWN
from mergekit_metagpt.mergekit_private import DTYPE_LOGGER, MERGE_LOGGER, is_about_dtype

_KNOWN = f"{__name__}.known"


class MergeCommand(click.Command):
    """A command that also takes every option of MergeKit, as ``mergekit-yaml`` does.

    Its function gets them as ``merge_options``, of MergeKit's own class. Loading these options
    imports torch, which is slow. They are therefore loaded only when one of them is given or
    when the command runs, not for ``--help``, a missing argument or a misspelt option.

    If the command raises an exception, the user sees one sentence, or with ``--verbose`` the
    traceback.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(
            click.Option(["--verbose"], is_flag=True, help="Show the traceback of a failure.")
        )

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, and MergeKit's once they are loaded."""
        # For completion, names are enough.
        known = ctx.meta.get(_KNOWN, SHOWN if ctx.resilient_parsing else [])
        return self._own(ctx) + self._besides(ctx, known)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; load MergeKit's options only if one is not the command's own."""
        try:
            return super().parse_args(ctx, list(args))
        except click.NoSuchOption as error:
            theirs = _flags(SHOWN)
            if error.option_name in theirs and _KNOWN not in ctx.meta:
                _, ctx.meta[_KNOWN] = _merge_options()
                return self.parse_args(ctx, args)
            known = [*_flags(self._own(ctx)), *theirs]
            close = get_close_matches(error.option_name, known, cutoff=0.75)
            raise click.NoSuchOption(error.option_name, possibilities=close, ctx=ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the command's own options, and MergeKit's below them."""
        own, theirs = self._own(ctx), self._besides(ctx, SHOWN)
        for title, options in (("Options", own), ("MergeKit's options", theirs)):
            shown = [option for option in options if isinstance(option, click.Option)]
            records = [option.get_help_record(ctx) for option in shown]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])

    def _own(self, ctx: click.Context) -> list[click.Parameter]:
        return super().get_params(ctx)

    def _besides(
        self, ctx: click.Context, options: Iterable[click.Parameter]
    ) -> list[click.Parameter]:
        """Return those options that the command does not have itself."""
        names = {parameter.name for parameter in self._own(ctx)}
        return [option for option in options if option.name not in names]

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
            reason = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(reason) from error


def _flags(options: Iterable[click.Parameter]) -> list[str]:
    return [flag for option in options for flag in (*option.opts, *option.secondary_opts)]


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
