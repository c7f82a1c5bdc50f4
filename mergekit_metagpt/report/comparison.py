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
    def mean_kept(self) -> float | None:
        """How much of the task vectors is in the merge, on average, if it is known."""
        kept = [expert.kept for expert in self.summary.experts if expert.kept is not None]
        return fmean(kept) if kept else None

    @property
    def is_dominated(self) -> bool:
        """Whether one of several experts has nearly all of the merge, or of most tensors."""
        means = [expert.mean for expert in self.summary.experts]
        dominated = dominated_part(self.summary) > 0.5 or max(means) > DOMINANT
        return not self.summary.by_direction and len(means) > 1 and dominated

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
    """Return what ``mergekit-metagpt compare`` shows: a row for each choice, and advice."""
    first = compared[0].forecast
    names = short_names(first.experts)
    digits = 3 if len(names) < 4 else 2  # 80 columns have no room for more
    rows = [[f"{it.mean:.{digits}f}" for it in choice.summary.experts] for choice in compared]
    columns = {
        "granularity": [choice.summary.granularity for choice in compared],
        "k": [choice.summary.exponent for choice in compared],
        "weights": [choice.weights for choice in compared],
        **{str(n): cells for n, cells in enumerate(map(list, zip(*rows, strict=True)), 1)},
        "bound": ["" if it.bound is None else f"{it.bound:.3f}" for it in compared],
        "kept": ["" if it.mean_kept is None else f"{it.mean_kept:.1%}" for it in compared],
        "dom.": [f"{dominated_part(choice.summary):.0%}" for choice in compared],
    }
    if not any(columns["weights"]):
        del columns["weights"]
    return Group(
        Text(f"{first.method.spec.name}; base {first.base}\n"),
        Text("\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))),
        table(columns),
        Text(
            "k: the exponent. 1, 2, …: the mean coefficient of each expert; at direction, how much "
            "of it is kept. bound: the paper's, relative to granularity model with exponent 2. "
            "kept: how much of the task vectors is in the merge, on average. dom.: the part of the "
            f"parameters in tensors where one expert dominates, with over {DOMINANT:.0%}.\n"
        ),
        Text(advice(compared), "bold"),
    )


def advice(compared: Sequence[Choice]) -> str:
    """Return one sentence that follows from the figures, and from nothing else."""
    numbers = [choice for choice in compared if not choice.summary.by_direction]
    even = [choice for choice in numbers if not choice.is_dominated]
    most = max((choice.mean_kept or 0.0 for choice in numbers), default=0.0)
    for choice in compared:
        if choice.summary.by_direction and choice.mean_kept:
            others = f", and no other choice more than {most:.0%}" if most else ""
            kept = f"{choice.mean_kept:.0%} of the task vectors on average"
            return f"Granularity direction keeps {kept}{others}."
    if not even:
        return "One expert dominates in each of these choices; give it a smaller weight."
    if dominated := len(numbers) - len(even):
        best = min(even, key=lambda choice: round(choice.bound or 0.0, 6)).title
        return (
            f"One expert dominates in {dominated} of these {len(numbers)} choices; choose another, "
            f"such as {best}."
        )
    more = (
        f", and none keeps more than {most:.0%} of the task vectors; see how much --granularity "
        "direction keeps"
    )
    return f"No expert dominates in these choices{more if most else ''}."
