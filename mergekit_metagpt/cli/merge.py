"""``mergekit-metagpt merge``: check, merge, record; the output appears whole or not at all."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import config_argument, ray_mapper, ray_option, wants_progress
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli.check import require_sound

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.merging.whole import Merger


@click.command(cls=MergeCommand)
@config_argument
@click.argument("out", type=click.Path(path_type=Path))
@ray_option
@click.pass_context
def merge(
    context: click.Context,
    config: str,
    out: Path,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Merge CONFIG into the new directory OUT, as mergekit-yaml does, but safely.

    Everything that can be known beforehand is checked before any work. OUT appears when the
    merge is complete, with the coefficients in its model card and a record in metagpt.json.

    \b
    Example:
      mergekit-metagpt merge metagpt.yml merged/ --random-seed 0
    """
    from mergekit_metagpt.merging.whole import merge_here, merge_whole
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    require_sound(config, str(out), merge_options)
    written = read_config(config)
    parsed = written.parse()
    merge_options = with_fresh_lora_cache(merge_options, parsed)
    merge_options = merge_options.model_copy(update={"quiet": not wants_progress(merge_options)})
    context.params["merge_options"] = merge_options  # a survey asks there whether it is quiet
    merger: Merger = merge_here
    if ray is not None:
        from mergekit_metagpt.merging.cluster import merge_on_cluster

        merger = partial(merge_on_cluster, mapper=ray_mapper(ray, merge_options))
    merge_whole(parsed, written.text, out, merge_options, merger)
