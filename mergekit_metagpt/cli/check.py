"""``mergekit-metagpt check``: find the problems of a merge before it runs."""

import logging

import click
import transformers
from mergekit.options import MergeOptions
from rich.filesize import decimal
from rich.table import Table

from mergekit_metagpt import preflight
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.planning.config import ConfigFile


@click.command(cls=_shared.MergeCommand)
@click.argument("config", type=click.Path(allow_dash=True))
@click.argument("out", type=click.Path(), required=False)
def check(config: str, out: str | None, merge_options: MergeOptions) -> None:
    """Find what is wrong with a merge, without reading a tensor.

    CONFIG is a MergeKit config, of any merge method; OUT is where the merge would be written.
    Prints what the merge will cost. If there are problems, prints all of them instead and
    exits with code 1. Reads only configs, tokenizers and the headers of weight files, so it
    takes seconds.

    \b
    Example:
      mergekit-metagpt check metagpt.yml merged/
    """
    logging.basicConfig(level=logging.INFO if merge_options.verbosity else logging.ERROR)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    found = require_sound(config, out, merge_options)
    if found.costs and not merge_options.quiet:
        _show(found.costs)


def require_sound(
    config: ConfigFile | str, out: str | None, options: MergeOptions
) -> preflight.Preflight:
    """Warn, and return what was found; if there are problems, print them and exit with 1."""
    found = preflight.inspect(config, out, options)
    for problem in found.problems:
        click.echo(problem, err=True)
    if found.problems:
        raise click.exceptions.Exit(1)
    _shared.warn(found.warnings)
    return found


def _show(costs: preflight.Costs) -> None:
    """Print what a merge will cost as a table, and the notes."""
    rows = [("Method", costs.method)]
    rows += [("Base", costs.base)] if costs.base else []
    rows += [("Expert" if costs.base else "Model", expert) for expert in costs.experts]
    rows += [
        ("Tensors", f"{costs.tensors:,}"),
        ("Parameters", f"{costs.parameters:,}"),
        ("Passes over the models", str(costs.passes)),
        ("Bytes read", decimal(costs.bytes_read)),
        ("Bytes written", decimal(costs.bytes_written)),
        ("Output shards", str(costs.shards)),
    ]
    if costs.by_direction:
        rows.append(("Arithmetic on this machine", _duration(costs.arithmetic)))
    if costs.bytes_applied:
        rows.append(("Bytes written to the LoRA cache", decimal(costs.bytes_applied)))
    table = Table(title="No problems found", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    _shared.console().print(table)
    for note in costs.notes:
        click.echo(note)


def _duration(seconds: float) -> str:
    """Write a duration for people.

    >>> _duration(0.4), _duration(42.3), _duration(3900)
    ('under 2 seconds', 'about 42 seconds', 'about 65 minutes')
    """
    if seconds < 2:
        return "under 2 seconds"
    return f"about {seconds:.0f} seconds" if seconds < 120 else f"about {seconds / 60:.0f} minutes"
