"""The command ``mergekit-metagpt``: a file for each subcommand, imported when it is used."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Any

import click

from mergekit_metagpt import __version__
from mergekit_metagpt.wording import nearest

# To add a subcommand, add the file `NAME.py` with the function `NAME` to this folder, and here
# its name and the first sentence of its help. They are listed and completed without the file,
# because its imports take seconds.
_COMMANDS = {
    "survey": "Measure the task vectors of each EXPERT, a fine-tune of BASE.",
    "coefficients": "Measure the task vectors of CONFIG and print the coefficients its merge will "
    "use.",
    "compare": "Compare the coefficients that CONFIG would get from other parameters.",
    "check": "Find what is wrong with a merge, without reading a tensor.",
    "diagnose": "Test the assumptions of MetaGPT on the models of CONFIG, any MergeKit config.",
    "resolve": "Write CONFIG as stock MergeKit YAML with explicit weights.",
    "merge": "Merge CONFIG into the new directory OUT, as mergekit-yaml does, but safely.",
    "evaluate": "Score OUT, the merge of CONFIG, with lm-eval, beside its base and its experts.",
    "demo": "Train small models, merge them and show the scores.",
}


class _LazyGroup(click.Group):
    """A group whose subcommands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = nearest(args[0], _COMMANDS)
            hint = f" Did you mean {close!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        name, _, rest = super().resolve_command(ctx, args)
        try:
            module = import_module(f"{__name__}.{name}")
        except ImportError as error:  # of a name that another version of MergeKit has not
            raise click.ClickException(str(error)) from error
        return name, getattr(module, str(name)), rest

    def invoke(self, ctx: click.Context) -> Any:
        with _stopped_once():
            return super().invoke(ctx)


@contextmanager
def _stopped_once() -> Iterator[None]:
    """Let SIGINT (Ctrl-C), SIGTERM and SIGHUP end a command in one line.

    After the first signal, further ones are ignored, so that the command can clean up. Signals
    that the parent process ignores stay ignored, such as SIGHUP under ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signal handlers only in the main thread
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, n) for n in names)}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise click.ClickException(f"This command was {str(stopped) or 'stopped'}.") from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What a list shows of the commands.
_LISTED = [click.Command(name, help=text) for name, text in _COMMANDS.items()]


@click.group(cls=_LazyGroup, commands=_LISTED, epilog="Example: mergekit-metagpt demo")
@click.version_option(__version__, prog_name="mergekit-metagpt")
def main() -> None:
    """MetaGPT for MergeKit: closed-form scaling coefficients for merging models."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # ASCII has no λ
