"""What-if tables: the coefficients that other parameters of one config would give."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit.common import ModelReference
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.method.advice import DOMINANT, dominated_part
from mergekit_metagpt.method.summary import Expert
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report.tables import bounds, kept

# So many experts leave room for two digits of each mean in 80 columns; more, hardly for these.
_MANY, _VERY_MANY = 3, 9


@dataclass(frozen=True)
class Choice:
    """A choice of parameters, and the merge that it would give.

    Attributes:
        forecast: the coefficients of the merge.
        priors: w_t of some experts, if they are not the config's.
    """

    forecast: Forecast
    priors: Mapping[ModelReference, float] | None = None

    @property
    def granularity(self) -> str:
        """The scope of the coefficients."""
        return " and ".join(self.forecast.summary.granularities)

    @property
    def exponent(self) -> str:
        """K in λ ∝ w ‖τ‖^k."""
        exponents = {entry.exponent for entry in self.forecast.summary.entries}
        return " and ".join(f"{exponent:g}" for exponent in sorted(exponents))

    @property
    def weights(self) -> str:
        """The priors that are not the config's, in words."""
        experts = self.forecast.experts
        given = zip(experts, short_names(experts, 24), strict=True)
        priors = self.priors or {}
        return ", ".join(f"{name} {priors[e]:g}" for e, name in given if e in priors)

    @property
    def title(self) -> str:
        """The choice in words."""
        return f"{self.granularity}, exponent {self.exponent}" + (
            f", {self.weights}" if self.priors else ""
        )

    @cached_property
    def bound(self) -> float | None:
        """The paper's bound, relative to that of MetaGPT for the whole model, if it is known."""
        return bounds(self.forecast).get("merge")

    @cached_property
    def kept(self) -> list[float | None]:
        """How much of each task vector is in the merge, T values; None if not known."""
        return kept(self.forecast)

    @cached_property
    def mean_kept(self) -> float | None:
        """The mean of ``kept``, if it is known."""
        known = [part for part in self.kept if part is not None]
        return math.fsum(known) / len(known) if known else None

    @cached_property
    def dominated(self) -> float:
        """The part of the parameters in tensors where one expert has over 90 %."""
        return dominated_part(self.forecast.summary)

    def as_json(self) -> dict[str, Any]:
        """Return the choice and its figures as JSON types."""
        bound = self.bound
        return {
            "granularity": self.granularity,
            "exponent": self.exponent,
            "weights": self.priors and {str(model): w for model, w in self.priors.items()},
            "experts": [
                {
                    "model": str(expert.model),
                    "coefficient": expert.mean,
                    "least": expert.least,
                    "largest": expert.largest,
                    "kept": part,
                }
                for expert, part in zip(self.forecast.summary.experts, self.kept, strict=True)
            ],
            "bound": bound if bound is not None and math.isfinite(bound) else None,
            "dominated": self.dominated,
        }


def choices(
    forecasts: Iterable[Forecast],
    exponents: Sequence[float],
    priors: Sequence[Mapping[ModelReference, float]],
) -> list[Choice]:
    """Return every combination of granularity, exponent and priors.

    Args:
        forecasts: one for each granularity, with the config's exponent and priors.
        exponents: exponents to compare. A matrix of coefficients keeps the config's.
        priors: priors to compare with the config's; matrices keep those, too.
    """
    found = []
    for forecast in forecasts:
        if any(tensor.entry.directions for tensor in forecast.tensors):
            found.append(Choice(forecast))
            continue
        for weights in (None, *priors):
            found += [Choice(forecast.changed(k, weights), weights) for k in exponents]
    return found


def comparison_tables(compared: Sequence[Choice]) -> RenderableType:
    """Return what ``mergekit-metagpt compare`` shows: a row for each choice, and advice."""
    first = compared[0].forecast
    names = short_names(first.experts)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("granularity", no_wrap=True)
    table.add_column("k", justify="right", no_wrap=True)
    with_priors = any(choice.priors for choice in compared)
    if with_priors:
        table.add_column("weights", overflow="fold")
    for number in range(len(names)):
        table.add_column(str(number + 1), justify="right", no_wrap=len(names) < _VERY_MANY)
    for column in ("bound", "kept", "dom."):
        table.add_column(column, justify="right", no_wrap=True)
    for choice in compared:
        experts = choice.forecast.summary.experts
        cells = [choice.granularity, choice.exponent]
        cells += [choice.weights] if with_priors else []
        cells += [_coefficient(expert, len(names) > _MANY) for expert in experts]
        cells.append("" if choice.bound is None else f"{choice.bound:.3f}")
        cells.append("" if choice.mean_kept is None else f"{choice.mean_kept:.1%}")
        cells.append(f"{choice.dominated:.0%}")
        table.add_row(*map(Text, cells))
    return Group(
        Text(f"{first.method.spec.name}; base {first.base}\n"),
        Text("\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))),
        table,
        Text(
            "k: the exponent. 1, 2, …: the mean coefficient of each expert; at direction, how much "
            "of it is kept"
            + "; below it the least and the largest of any tensor"
            * (len(names) <= _MANY)
            + ". bound: the paper's, relative to granularity model with exponent 2. kept: how much "
            "of the task vectors is in the merge, on average. dom.: the part of the parameters in "
            f"tensors where one expert dominates, with over {DOMINANT:.0%}.\n"
        ),
        Text(advice(compared), "bold"),
    )


def advice(compared: Sequence[Choice]) -> str:
    """Return one sentence that follows from the figures, and from nothing else."""
    matrices = next((choice for choice in compared if choice.granularity == "direction"), None)
    numbers = [choice for choice in compared if choice is not matrices]
    even = [choice for choice in numbers if not _is_dominated(choice)]
    most = max((choice.mean_kept or 0.0 for choice in numbers), default=0.0)
    if matrices and matrices.mean_kept and most:
        return (
            f"Granularity direction keeps {matrices.mean_kept:.0%} of the task vectors on average, "
            f"and no other choice more than {most:.0%}."
        )
    if not even:
        return "One expert dominates in each of these choices; give it a smaller weight."
    if len(even) < len(numbers):
        best = min(even, key=lambda choice: round(choice.bound or 0.0, 6))
        return (
            f"One expert dominates in {len(numbers) - len(even)} of these {len(numbers)} choices; "
            f"of the others, {best.title} has the least bound."
        )
    if most:
        return (
            f"No expert dominates in these choices, and none keeps more than {most:.0%} of the "
            "task vectors; see how much --granularity direction keeps."
        )
    return "No expert dominates in these choices."


def _is_dominated(choice: Choice) -> bool:
    summary = choice.forecast.summary
    if summary.by_direction:
        return False
    means = [expert.mean for expert in summary.experts]
    return len(means) > 1 and (max(means) > DOMINANT or choice.dominated > 0.5)


def _coefficient(expert: Expert, is_short: bool) -> str:
    if is_short:
        return _in_short(expert.mean)
    if expert.least == expert.largest:
        return f"{expert.mean:.3f}"
    return f"{expert.mean:.3f}\n{_in_short(expert.least)}-{_in_short(expert.largest)}"


def _in_short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")
