"""What-if tables: the coefficients that other parameters of one config would give."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any

from mergekit.common import ModelReference
from rich.console import Group, RenderableType
from rich.text import Text

from mergekit_metagpt.method.advice import DOMINANT, dominated_part
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report.tables import LONGEST_NAME, bounds, table


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
        named = zip(experts, short_names(experts, LONGEST_NAME), strict=True)
        return ", ".join(f"{name} {priors[expert]:g}" for expert, name in named if expert in priors)

    @property
    def title(self) -> str:
        """The choice in words."""
        words = [self.summary.granularity, f"exponent {self.summary.exponent}", self.weights]
        return ", ".join(filter(None, words))

    @cached_property
    def bound(self) -> float | None:
        """The paper's bound, relative to that of MetaGPT for the whole model, if it is known."""
        return bounds(self.forecast).get("merge")

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


def choices(
    forecasts: Iterable[Forecast],
    exponents: Sequence[float],
    priors: Sequence[Mapping[ModelReference, float]],
) -> list[Choice]:
    """Return each forecast with every combination of exponent and priors, also the config's own.

    At granularity direction, a forecast keeps the config's exponent and priors.
    """
    combinations = []
    for forecast in forecasts:
        if forecast.summary.by_direction:
            combinations.append(Choice(forecast))
        else:
            pairs = product((None, *priors), exponents)
            combinations += [Choice(forecast.changed(k, own), own) for own, k in pairs]
    return combinations


def comparison_tables(compared: Sequence[Choice]) -> RenderableType:
    """Return what ``mergekit-metagpt compare`` shows: a row for each choice."""
    first, rows = compared[0].forecast, [choice.cells for choice in compared]
    names = enumerate(short_names(first.experts), 1)
    columns = {title: [row[title] for row in rows] for title in rows[0]}
    if not any(columns["weights"]):
        del columns["weights"]
    return Group(
        Text(f"{first.method.spec.name}; base {first.base}\n"),
        Text("\n".join(f"{number}  {name}" for number, name in names)),
        table(columns),
        Text(
            "k: the exponent. 1, 2, …: the mean coefficient of each expert; at direction, how much "
            "of it is kept. bound: the paper's, relative to granularity model with exponent 2. "
            "kept: how much of the task vectors is in the merge, on average. dom.: the part of the "
            f"parameters in tensors where one expert dominates, with over {DOMINANT:.0%}."
        ),
    )
