"""``mergekit-metagpt survey``: measure models once, and keep the figures in a file."""

from functools import partial
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import keep_option, ray_mapper, ray_option, wants_progress
from mergekit_metagpt.cli._options import MergeCommand

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(cls=MergeCommand)
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    default="survey.json",
    show_default=True,
    help="Write the survey to this file.",
)
@keep_option
@ray_option
def survey(
    base: str,
    experts: tuple[str, ...],
    output: str,
    keep: bool,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Measure the task vectors of each EXPERT, a fine-tune of BASE, and write them to a file.

    Models are named as in a config: model, model@revision or model+lora. Other commands take the
    file as --survey, for a config with the same base and any of these experts. They then read
    no weights, and refuse the file if a weight file has changed.

    \b
    Example:
      mergekit-metagpt survey path/to/base path/to/math path/to/code -o survey.json
      mergekit-metagpt compare metagpt.yml --survey survey.json
    """
    from mergekit.config import MergeConfiguration

    from mergekit_metagpt.api.running import measured
    from mergekit_metagpt.cli._output import console, write_text
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.report.tables import survey_tables

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "metagpt",
            "base_model": base,
            "models": [{"model": model} for model in experts],
        }
    )
    options = with_fresh_lora_cache(merge_options, config)
    found, _, text = measured(
        config,
        options,
        keep=keep,
        progress=wants_progress(options),
        mapper=None if ray is None else partial(ray_mapper, ray),
    )
    write_text(output, text)
    if output != "-":
        console().print(survey_tables(found))
        click.echo(f"The survey is in {output}.")
