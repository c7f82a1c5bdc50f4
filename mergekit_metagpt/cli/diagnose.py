"""``mergekit-metagpt diagnose``: whether the paper's two assumptions hold for these models."""

from collections.abc import Sequence
from pathlib import Path

import click
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers.utils import logging

from mergekit_metagpt.api.functions import measured
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.diagnosis import linearity
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.config import read_config
from mergekit_metagpt.planning.job import running
from mergekit_metagpt.planning.models import require_models
from mergekit_metagpt.report import plots, tables

# From where on outputs count as linear in α, and up to where task vectors do as orthogonal.
_LEAST_R_SQUARED, _LARGEST_COSINE = 0.95, 0.1


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt per line, in UTF-8, of which 32 are used; without it, built-in prompts.",
)
@_shared.plot_option("the outputs and the cosines")
def diagnose(
    config: str, prompts: Path | None, plot: Path | None, merge_options: MergeOptions
) -> None:
    """Test the assumptions of MetaGPT on the models of CONFIG, any MergeKit config.

    Linearity: follows the logits of the likely next tokens from the base to each expert in 10
    steps, and compares them with straight lines. R² covers all these logits together. The
    movement of a logit is its change from base to expert; the table shows the root mean square.
    Orthogonality: prints the cosines of the task vectors.

    One model runs at a time, in float32. It takes 4 bytes of memory per parameter, on the
    given --device.

    \b
    Example:
      mergekit-metagpt diagnose metagpt.yml --prompts questions.txt --plot assumptions.png
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one for all models is enough
    with running(read_config(config), merge_options) as job:
        options, (base, experts) = job.options, job.base_and_experts
        require_models((base, *experts), options)
        for model in (*experts, base):
            LoaderCache().get(model)  # to run the models, they have to be downloaded anyway
            linearity.architecture_of(model, options.trust_remote_code)
        ids = linearity.token_ids(prompts, base, options)
        click.echo(f"Prompts: {len(ids)}{f' from {prompts}' if prompts else ''}.\n")
        survey = measured(job).figures
        lines = linearity.measure_linearity(base, survey, ids, options)
    names, fits = short_names(survey.experts), [line.r_squared for line in lines]
    columns = {
        "expert": names,
        "R²": ["" if fit is None else f"{fit:.4f}" for fit in fits],
        "linear": ["" if x is None else "yes" if x >= _LEAST_R_SQUARED else "no" for x in fits],
        "movement, logits": [f"{line.movement:.2g}" for line in lines],
    }
    show = _shared.console().print
    show("Linearity (Property 5)", tables.table(columns), sep="\n")
    for name, line in zip(names, lines, strict=True):
        if line.held:
            click.echo(
                f"{', '.join(line.held)}: the vocabulary of {name} differs, so these tensors keep "
                "the base's values and the lines end before they reach this expert."
            )
    show(
        f"linear: R² is at least {_LEAST_R_SQUARED}, so on these prompts the bound that MetaGPT "
        "minimises applies. Where it is not, the coefficients are a heuristic: score the merge "
        "before you rely on it. Without R²: the outputs move by no more than rounding.\n"
    )
    title, cosines = "Orthogonality (Property 6)", tables.cosines_table(survey)
    show(title, cosines, _verdict(survey.cosines), sep="\n")
    if plot is not None:
        with _shared.whole(plot) as path:
            plots.diagnosis_figure(names, lines, survey.cosines).savefig(path)


def _verdict(cosines: Sequence[Sequence[float]]) -> str:
    largest = max((abs(row[j]) for i, row in enumerate(cosines) for j in range(i)), default=None)
    if largest is None:
        return "With one expert there is no pair to compare."
    nearly = "Nearly orthogonal" if largest < _LARGEST_COSINE else "Not orthogonal"
    return (
        f"{nearly}: the largest |cosine| of two experts is {largest:.2f}. The coefficients do not "
        "need orthogonality, but experts that share a direction interact in the merge."
    )
