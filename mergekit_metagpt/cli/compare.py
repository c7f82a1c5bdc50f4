"""``mergekit-metagpt compare``: what other parameters would give, from one survey."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import forecasts
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.names import short_names
from mergekit_metagpt.report import comparison, plots
from mergekit_metagpt.wording import one_of

_NUMBERS = [name for name, granularity in GRANULARITIES.items() if not granularity.by_direction]
_WEIGHT: Any = click.FloatRange(min=0)


@click.command(cls=_shared.MergeCommand)
@_shared.config_argument
@click.option(
    "--granularity",
    "granularities",
    multiple=True,
    type=click.Choice(list(GRANULARITIES)),
    help=f"Compare these; may be repeated. Without it: {', '.join(_NUMBERS)}. For direction, "
    "the models are read once more.",
)
@click.option(
    "--exponent",
    "exponents",
    multiple=True,
    type=click.FloatRange(min=0),
    default=(2.0, 1.0, 0.0),
    show_default=True,
    help="Compare these; may be repeated.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="EXPERT=W[,...]",
    help="Compare these priors with the config's; may be repeated.",
)
@_shared.json_option
@_shared.plot_option("the coefficients by layer of every choice")
@_shared.ray_option
def compare(
    config: str,
    granularities: tuple[str, ...],
    exponents: tuple[float, ...],
    weights: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    ray: str | None,
    merge_options: MergeOptions,
) -> None:
    """Compare the coefficients that CONFIG would get from other parameters.

    The models are measured once. Nothing is merged.

    \b
    Example:
      mergekit-metagpt compare metagpt.yml --weights math=2,code=1 --plot compare.png
    """
    chosen = granularities or _NUMBERS
    found = forecasts(config, merge_options, chosen, ray=ray, warn=_shared.warn)
    priors = [_priors(given, found[0].experts) for given in weights]
    compared = comparison.choices(found, exponents, priors)
    if as_json:
        click.echo(json.dumps({"choices": [choice.as_json() for choice in compared]}))
    else:
        _shared.console().print(comparison.comparison_tables(compared))
    if plot is not None:
        panels = [(choice.title, choice.summary) for choice in compared]
        title = plots.titled(found[0].method.spec.name, found[0].base)
        plots.comparison_figure(panels, title).savefig(plot)


def _priors(given: str, experts: Sequence[ModelReference]) -> dict[ModelReference, float]:
    """Return w_t by expert from ``EXPERT=W,EXPERT=W``; an expert may have its short name."""
    short = short_names(experts)
    known = {**dict(zip(short, experts, strict=True)), **{str(e): e for e in experts}}
    priors = {}
    for pair in given.split(","):
        name, _, number = pair.rpartition("=")
        if name not in known:
            raise click.BadParameter(
                f"{pair!r} names no expert; write EXPERT=W, where EXPERT is {one_of(short)}.",
                param_hint="--weights",
            )
        priors[known[name]] = _WEIGHT.convert(number, None, None)
    return priors
