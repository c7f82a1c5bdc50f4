"""``mergekit-metagpt merge``: check, merge, record; the output appears whole or not at all."""

import secrets
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_metagpt.cli._config import (
    config_argument,
    ray_mapper,
    ray_option,
    survey_options,
    wants_progress,
    warn,
)
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import console, write_text
from mergekit_metagpt.cli.check import require_sound

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


@click.command(cls=MergeCommand)
@config_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a merge into OUT that was stopped or killed, from its complete files.",
)
@click.option(
    "--name-of",
    "names_of",
    multiple=True,
    metavar="PATH=USER/NAME",
    help="The hub's name of a path in CONFIG, which the card shows instead; may be repeated.",
)
@click.option(
    "--model-index",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Scores for the card: a results_*.json of lm-eval, such as evaluate writes.",
)
@survey_options
@ray_option
@click.pass_context
def merge(
    context: click.Context,
    config: str,
    out: Path,
    resume: bool,
    names_of: tuple[str, ...],
    model_index: Path | None,
    survey: str | None,
    save_survey: str | None,
    ray: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Merge CONFIG into the new directory OUT, as mergekit-yaml does, but safely.

    Checks everything it can before it starts. OUT appears only when the merge is complete,
    with the coefficients in its model card and a record in metagpt.json.

    \b
    Example:
      mergekit-metagpt merge metagpt.yml merged/ --random-seed 0
    """
    from mergekit_metagpt.api.running import adopt_survey, measured, publication
    from mergekit_metagpt.merging.journal import resumed_seed
    from mergekit_metagpt.merging.whole import merge_whole
    from mergekit_metagpt.method.advice import warnings
    from mergekit_metagpt.method.session import SESSION
    from mergekit_metagpt.method.summary import Summary
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.report.tables import coefficients_table

    before = resumed_seed(out) if resume else None
    if merge_options.random_seed is None:
        seed = secrets.randbits(32) if before is None else before  # numpy takes no larger seeds
        merge_options = merge_options.model_copy(update={"random_seed": seed})
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    written = read_config(config)
    found = require_sound(written, str(out), merge_options)
    quiet = merge_options.quiet
    parsed = written.parse()
    published = publication(written, out, names_of, model_index)
    merge_options = with_fresh_lora_cache(merge_options, parsed)
    merge_options = merge_options.model_copy(update={"quiet": not wants_progress(merge_options)})
    context.params["merge_options"] = merge_options  # where a survey looks for quiet
    mapper = None if ray is None else ray_mapper(ray, merge_options)
    with SESSION.journal() as entries:
        adopt_survey(survey, parsed, merge_options)
        if save_survey:
            progress = wants_progress(merge_options)
            measure = partial(measured, parsed, merge_options, keep=True, progress=progress)
            *_, text = measure(mapper=None if mapper is None else lambda *_: mapper)
            write_text(save_survey, text)
        if resume and before is None:
            warn([f"No unfinished merge into {out} can go on, so this one begins anew."])
        merge_whole(
            parsed,
            written.text,
            out,
            merge_options,
            published,
            outputs=found.outputs,
            mapper=mapper,
            resume=resume,
        )
    summary = Summary(entries)
    warn(warnings(summary))
    if not quiet:
        if entries:
            console().print(coefficients_table(summary))
        click.echo(f"The merge is in {out}. To publish it:")
        click.echo(shlex.join(["hf", "upload", "USER/NAME", str(out)]))
