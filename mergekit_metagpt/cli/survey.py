"""``mergekit-metagpt survey``: how far experts moved from their base, and in which directions."""

import json

import click
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import comparing, measured
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.planning.job import running


@click.command(cls=_shared.MergeCommand)
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT...")
@_shared.json_option
@_shared.ray_option
def survey(
    base: str,
    experts: tuple[str, ...],
    as_json: bool,
    ray: str | None,
    merge_options: MergeOptions,
) -> None:
    """Measure the task vectors of each EXPERT, a fine-tune of BASE.

    Models are named as in a config: model, model@revision or model+lora. A small cache keeps the
    figures: no command measures the same models again, nor any of these experts alone. Models on
    the hub are read tensor by tensor, and not stored.

    \b
    Example:
      mergekit-metagpt survey path/to/base path/to/math path/to/code
    """
    with running(comparing(base, experts), merge_options) as job:
        found = measured(job, ray)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        _shared.console().print(found.shown()[-1])
