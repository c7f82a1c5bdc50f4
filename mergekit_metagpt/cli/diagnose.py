"""``mergekit-metagpt diagnose``: whether the paper's two assumptions hold for these models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.cli._config import (
    config_argument,
    survey_options,
    wants_progress,
)
from mergekit_metagpt.cli._options import MergeCommand
from mergekit_metagpt.cli._output import console, save_figure, write_text

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_metagpt.diagnosis.linearity import Linearity
    from mergekit_metagpt.measure.survey import Survey

# Outputs count as linear in α from this R² on, and task vectors as orthogonal below this |cosine|.
_LINEAR, _ORTHOGONAL = 0.95, 0.1


@click.command(cls=MergeCommand)
@config_argument
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="One prompt per line, in UTF-8; without it, a few built-in prompts.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the outputs and the cosines.",
)
@survey_options
def diagnose(
    config: str,
    prompts: Path | None,
    plot: Path | None,
    survey: str | None,
    save_survey: str | None,
    merge_options: "MergeOptions",
) -> None:
    """Test the assumptions of MetaGPT on the models of CONFIG, any MergeKit config.

    Linearity: follows logits of the next token from the base to each expert in 10 steps, and
    compares them with straight lines. R² covers all these logits together. The movement of a
    logit is its change from base to expert; the table shows the root mean square. The largest
    deviation from a line is given as a share of the largest movement. Orthogonality: prints
    the cosines of the task vectors.

    One model runs at a time, in float32. It takes 4 bytes of memory per parameter, on the
    given --device.

    \b
    Example:
      mergekit-metagpt diagnose metagpt.yml --prompts questions.txt --plot assumptions.png
    """
    if plot is not None:
        from mergekit_metagpt.report.plots import require_plotting

        require_plotting(plot)
    from mergekit_metagpt.api.running import adopt_survey
    from mergekit_metagpt.names import short_names
    from mergekit_metagpt.planning.config import read_config
    from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
    from mergekit_metagpt.report.tables import matrix

    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    parsed = read_config(config).parse()
    merge_options = with_fresh_lora_cache(merge_options, parsed)
    adopt_survey(survey, parsed, merge_options)
    linearities, found, text = _measure(parsed, prompts, merge_options)
    if save_survey is not None:
        write_text(save_survey, text)
    cosines = found.cosines
    names = short_names(linearity.expert for linearity in linearities)
    _show_linearity(names, linearities)
    console().print(Text("Orthogonality (Property 6): cosines of the task vectors", "bold"))
    console().print(matrix(names, cosines))
    click.echo(_cosines_verdict(names, cosines))
    if plot is not None:
        from mergekit_metagpt.report.plots import diagnosis_figure

        save_figure(diagnosis_figure(names, linearities, cosines), plot)
        click.echo(f"The figure is in {plot}.")


def _measure(
    config: "MergeConfiguration", prompts: Path | None, options: "MergeOptions"
) -> tuple[list["Linearity"], "Survey", str]:
    """Return the outputs of T experts, their survey in the same order, and as a file."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_metagpt.api.running import measured
    from mergekit_metagpt.diagnosis.linearity import measure_linearity
    from mergekit_metagpt.diagnosis.prompts import token_ids
    from mergekit_metagpt.diagnosis.running import language_model_config
    from mergekit_metagpt.planning.config import base_and_experts
    from mergekit_metagpt.planning.models import require_models

    LoaderCache().setup(options)
    base, experts = base_and_experts(config)
    require_models((base, *experts), options)
    for model in (*experts, base):
        known = language_model_config(model, options.trust_remote_code)
    ids, source = token_ids(prompts, base, known.get_text_config().vocab_size, options)
    click.echo(f"Prompts: {source}.")
    # To run the models, they have to be downloaded anyway.
    survey, base, text = measured(config, options, keep=True, progress=wants_progress(options))
    results = measure_linearity(
        base, survey, ids, options=options, progress=wants_progress(options)
    )
    return results, survey, text


def _show_linearity(names: Sequence[str], linearities: Sequence["Linearity"]) -> None:
    table = Table(
        title="Linearity (Property 5)",
        box=box.SIMPLE,
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    table.add_column("expert", overflow="fold")
    for column in ("R²", "largest deviation", "movement, logits"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in zip(names, linearities, strict=True):
        fit = [f"{result.r_squared:.4f}", f"{result.largest_deviation:.1%}"]
        table.add_row(name, *(fit if result.moves else ["", ""]), f"{result.movement:.2g}")
    console().print(table)
    for name, result in zip(names, linearities, strict=True):
        if result.held:
            click.echo(
                f"{', '.join(result.held)}: the vocabulary of {name} differs, so these tensors "
                "keep the base's values and the lines end before they reach this expert.",
            )
    click.echo(_linearity_verdict(names, linearities))


def _linearity_verdict(names: Sequence[str], linearities: Sequence["Linearity"]) -> str:
    """Say what the values of R² mean for the merge."""
    pairs = list(zip(names, linearities, strict=True))
    still = [name for name, result in pairs if not result.moves]
    curved = [name for name, result in pairs if result.moves and result.r_squared < _LINEAR]
    verdicts = []
    if still:
        verdicts.append(
            f"{', '.join(still)}: the outputs do not move by more than rounding, so R² is not "
            "defined."
        )
    if curved:
        verdicts.append(
            f"{', '.join(curved)}: not in the linear regime (R² under {_LINEAR}). There the bound "
            "that MetaGPT minimises is not guaranteed and its coefficients are a heuristic; score "
            "the merge before you rely on it."
        )
    elif len(still) < len(names):
        verdicts.append(
            f"In the linear regime (every R² is at least {_LINEAR}): Property 5 holds on these "
            "prompts, so the bound that MetaGPT minimises applies to these models."
        )
    return "\n".join(verdicts)


def _cosines_verdict(names: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """Say what the cosines mean for the merge."""
    pairs = [(abs(cosines[i][j]), i, j) for i in range(len(names)) for j in range(i)]
    if not pairs:
        return "With one expert there is no pair to compare."
    largest, i, j = max(pairs)
    if largest < _ORTHOGONAL:
        return (
            f"Nearly orthogonal: no |cosine| of two experts reaches {_ORTHOGONAL}, as Property 6 "
            "assumes; they hardly interfere with each other in the merge."
        )
    effect = "share a direction" if cosines[i][j] > 0 else "undo each other in part"
    return (
        f"Not orthogonal: {names[j]} and {names[i]} {effect} (cosine {cosines[i][j]:.2f}). The "
        "coefficients are still the exact minimiser of the bound, which does not need "
        "orthogonality, but expect these experts to interact in the merge."
    )
