"""``mergekit-metagpt compare``: what other parameters would give, from one survey."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_metagpt.api.functions import forecasts
from mergekit_metagpt.cli import _shared
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.method.advice import DOMINANT, dominated_part
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report import plots, tables
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
    priors = [None, *(_priors(given, found[0].experts) for given in weights)]
    compared = []
    for forecast in found:
        if forecast.summary.by_direction:  # keeps the config's exponent and priors
            compared.append(Choice(forecast))
        else:
            pairs = product(priors, exponents)
            compared += [Choice(forecast.changed(k, own), own) for own, k in pairs]
    if as_json:
        click.echo(json.dumps({"choices": [choice.as_json() for choice in compared]}))
    else:
        _show(compared)
    if plot is not None:
        panels = [(choice.title, choice.summary) for choice in compared]
        title = plots.titled(found[0].method.spec.name, found[0].base)
        with _shared.whole(plot) as path:
            plots.comparison_figure(panels, title).savefig(path)


@dataclass(frozen=True)
class Choice:
    """The merge that a choice of parameters would give; priors, if they are not the config's."""

    forecast: Forecast
    priors: Mapping[ModelReference, float] | None = None

    @property
    def summary(self) -> Summary:
        """The coefficients of the merge."""
        return self.forecast.summary

    @property
    def weights(self) -> str:
        """The priors that are not the config's, in words."""
        priors, experts = self.priors or {}, self.forecast.experts
        named = zip(experts, short_names(experts, tables.LONGEST_NAME), strict=True)
        return ", ".join(f"{name} {priors[expert]:g}" for expert, name in named if expert in priors)

    @property
    def title(self) -> str:
        """The choice in words."""
        words = [self.summary.granularity, f"exponent {self.summary.exponent}", self.weights]
        return ", ".join(filter(None, words))

    @cached_property
    def bound(self) -> float | None:
        """The paper's bound, relative to that of MetaGPT for the whole model, if it is known."""
        return tables.bounds(self.forecast).get("merge")

    @property
    def cells(self) -> dict[str, str]:
        """The row of a table, by the titles of its columns."""
        kept = [expert.kept for expert in self.summary.experts if expert.kept is not None]
        digits = 3 if len(self.summary.ids) < 4 else 2  # 80 columns have no room for more
        return {
            "granularity": self.summary.granularity,
            "k": self.summary.exponent,
            "weights": self.weights,
            **{str(n): f"{it.mean:.{digits}f}" for n, it in enumerate(self.summary.experts, 1)},
            "bound": "" if self.bound is None else f"{self.bound:.3f}",
            "kept": f"{fmean(kept):.1%}" if kept else "",
            "dom.": f"{dominated_part(self.summary):.0%}",
        }

    def as_json(self) -> dict[str, Any]:
        """Return the choice and its figures as JSON types."""
        shown = ("model", "coefficient", "least", "largest", "kept")
        experts = [expert.as_json() for expert in self.summary.experts]
        return {
            "granularity": self.summary.granularity,
            "exponent": self.summary.exponent,
            "weights": self.priors and {str(model): w for model, w in self.priors.items()},
            "experts": [{key: expert[key] for key in shown} for expert in experts],
            "bound": self.bound if math.isfinite(self.bound or 0.0) else None,
            "dominated": dominated_part(self.summary),
        }


def _show(compared: Sequence[Choice]) -> None:
    first, rows = compared[0].forecast, [choice.cells for choice in compared]
    columns = {title: [row[title] for row in rows] for title in rows[0]}
    if not any(columns["weights"]):
        del columns["weights"]
    _shared.console().print(
        f"{first.method.spec.name}; base {first.base}\n",
        *(f"{number}  {name}" for number, name in enumerate(short_names(first.experts), 1)),
        tables.table(columns),
        "k: the exponent. 1, 2, …: the mean coefficient of each expert; at direction, how much of "
        "it is kept. bound: the paper's, relative to granularity model with exponent 2. kept: how "
        "much of the task vectors is in the merge, on average. dom.: the part of the parameters in "
        f"tensors where one expert dominates, with over {DOMINANT:.0%}.",
        sep="\n",
    )


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
