"""The command ``mergekit-metagpt``: one file per subcommand, imported when it is used."""

from importlib import import_module

import click

from mergekit_metagpt import __version__
from mergekit_metagpt.cli._output import replace_unprintable

# To add a subcommand, add its name here, and the file `NAME.py` with the function `NAME` to
# this folder. Import torch and MergeKit only inside functions of that file: `--help` imports
# it, and must be fast.
_COMMANDS = ("check", "coefficients", "diagnose", "resolve", "merge", "demo")


class _LazyGroup(click.Group):
    """A group whose subcommands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_LazyGroup, epilog="Example: mergekit-metagpt demo")
@click.version_option(__version__, prog_name="mergekit-metagpt")
def main() -> None:
    """MetaGPT for MergeKit: closed-form scaling coefficients for merging models."""
    replace_unprintable()
