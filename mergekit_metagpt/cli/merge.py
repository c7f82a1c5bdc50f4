"""``mergekit-metagpt merge``: check, merge, record; the output appears whole or not at all."""

import shlex
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import merged
from mergekit_metagpt.cli import _shared


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--name-of",
    "names_of",
    multiple=True,
    metavar="PATH=USER/NAME",
    help="The hub's name of a path in CONFIG, which the card shows instead; may be repeated.",
)
@_shared.ray_option
def merge(
    config: str,
    out: Path,
    names_of: tuple[str, ...],
    ray: str | None,
    merge_options: MergeOptions,
) -> None:
    """Merge CONFIG into the new directory OUT, as mergekit-yaml does, but safely.

    Checks everything it can before it starts. OUT appears only when the merge is complete,
    with the coefficients in its model card and a record in metagpt.json. If the command stops,
    the same command goes on from the weight files that are complete.

    \b
    Example:
      mergekit-metagpt merge metagpt.yml merged/
    """
    found = merged(config, out, merge_options, names=names_of, ray=ray, warn=_shared.warn)
    _shared.warn(found.warnings)
    if not merge_options.quiet:
        if found.summary.entries:
            _shared.console().print(found.shown()[-1])
        click.echo(f"The merge is in {out}. To publish it:")
        click.echo(shlex.join(["hf", "upload", "USER/NAME", str(out)]))
