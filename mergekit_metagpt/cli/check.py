"""``mergekit-metagpt check``: find the problems of a merge before it runs."""

import math
from datetime import timedelta

import click
from mergekit.options import MergeOptions
from rich.filesize import decimal
from rich.table import Table

from mergekit_metagpt import preflight
from mergekit_metagpt.cli import _shared


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
    found = preflight.inspect(config, out, merge_options)
    _shared.warn(found.warnings)
    if not merge_options.quiet:
        _show(found.costs)


def _show(costs: preflight.Costs) -> None:
    rows = [
        ("Tensors", f"{costs.tensors:,}"),
        ("Parameters", f"{costs.parameters:,}"),
        ("Passes over the models", str(costs.passes)),
        ("Bytes read", decimal(costs.bytes_read)),
        ("Bytes written", decimal(costs.bytes_written)),
        ("Output shards", str(costs.shards)),
    ]
    if costs.by_direction:
        duration = timedelta(seconds=math.ceil(costs.arithmetic))
        rows.append(("Arithmetic on this machine", f"{duration} (h:mm:ss)"))
    if costs.bytes_applied:
        rows.append(("Bytes written to the LoRA cache", decimal(costs.bytes_applied)))
    table = Table(title="No problems found", show_header=False)
    for row in rows:
        table.add_row(*row)
    _shared.console().print(table)
    click.echo(
        "Headers do not show NaN, Inf or experts that equal the base: mergekit-metagpt "
        "coefficients and the merge itself find those."
    )
