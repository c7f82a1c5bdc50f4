"""The command ``mergekit-metagpt``: one file per subcommand, imported when it is used."""

from importlib import import_module
from typing import Any

import click

from mergekit_metagpt import __version__
from mergekit_metagpt.cli._output import replace_unprintable
from mergekit_metagpt.cli._signals import stopped_once
from mergekit_metagpt.wording import nearest

# To add a subcommand, add its name here, and the file `NAME.py` with the function `NAME` to
# this folder. Import torch and MergeKit only inside functions of that file: the list of all
# commands imports it, and must be fast.
_COMMANDS = (
    "survey",
    "coefficients",
    "compare",
    "check",
    "diagnose",
    "resolve",
    "merge",
    "evaluate",
    "demo",
)


class _LazyGroup(click.Group):
    """A group whose subcommands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = nearest(args[0], _COMMANDS)
            hint = f" Did you mean {close!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with stopped_once():
            return super().invoke(ctx)


@click.group(cls=_LazyGroup, epilog="Example: mergekit-metagpt demo")
@click.version_option(__version__, prog_name="mergekit-metagpt")
def main() -> None:
    """MetaGPT for MergeKit: closed-form scaling coefficients for merging models."""
    replace_unprintable()
