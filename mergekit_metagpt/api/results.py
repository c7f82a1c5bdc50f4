"""What the Python functions return: figures, tables for notebooks, and a plot."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference
from rich.console import Console, Group, RenderableType
from rich.text import Text

from mergekit_metagpt.measure import survey as measured
from mergekit_metagpt.method.advice import moved_far, share, warnings
from mergekit_metagpt.method.summary import Entry, Expert, Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report import plots, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = "<pre style='line-height: 1.2'>{code}</pre>"


class Shown(ABC):
    """What notebooks show as the commands do, and other places as a line."""

    @property
    def warnings(self) -> list[str]:
        """What to look at before you rely on it, one sentence each."""
        return []

    @abstractmethod
    def shown(self) -> tuple[str, Summary, RenderableType]:
        """Return a title, the coefficients, and tables of them."""

    def __repr__(self) -> str:
        title, summary, _ = self.shown()
        named = zip(short_names(summary.ids), summary.experts, strict=True)
        return f"<{title}: {', '.join(f'{name} {share(expert.mean)}' for name, expert in named)}>"

    def _repr_html_(self) -> str:
        title, _, shown = self.shown()
        console = Console(file=StringIO(), record=True, width=100, force_jupyter=False)
        console.print(Text(title, "bold"), Text(), shown, *map(Text, self.warnings), sep="\n")
        return console.export_html(inline_styles=True, code_format=_PAGE)


@dataclass(frozen=True, repr=False)
class Survey(Shown):
    """The task vectors of whole models, measured.

    Attributes:
        base: θ_0.
        figures: norms and inner products for each tensor, and their sums.
    """

    base: ModelReference
    figures: measured.Survey

    @property
    def experts(self) -> list[str]:
        """T models."""
        return list(map(str, self.figures.experts))

    @property
    def squared_norms(self) -> tuple[float, ...]:
        """‖θ_t − θ_0‖² over the whole model, T floats, as in Theorem 10."""
        return self.figures.model

    @property
    def cosines(self) -> list[list[float]]:
        """The T x T cosines between the task vectors."""
        return self.figures.cosines

    @property
    def summary(self) -> Summary:
        """The coefficients that Theorem 10 gives whole models, in canonical order."""
        its, priors = self.figures, (1.0,) * len(self.figures.experts)
        entry = Entry("model", "model", its.experts, its.model, priors, 2.0, its.parameters)
        return Summary([entry])

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON types, as ``mergekit-metagpt survey --json`` does."""
        return {
            "base": str(self.base),
            "experts": self.experts,
            "parameters": self.figures.parameters,
            "squared_norms": self.squared_norms,
            "coefficients": list(self.summary.entries[0].coefficients),
            "moved": self.figures.moved,
            "cosines": self.cosines,
            "left_out": list(self.figures.left_out),
        }

    def plot(self) -> "Figure":
        """Draw the coefficients of whole models, and the cosines; needs matplotlib."""
        cosines = self.figures.in_order_of(self.summary.ids).cosines
        return plots.coefficients_figure("metagpt", self.base, self.summary, cosines)

    def shown(self) -> tuple[str, Summary, RenderableType]:
        """Return what the command ``survey`` prints."""
        summary = self.summary
        cosines = tables.cosines_table(self.figures.in_order_of(summary.ids))
        shown = Group(tables.table(tables.expert_columns(summary)), cosines)
        return f"Survey of {len(self.experts)} experts of {self.base}", summary, shown


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The coefficients that a merge will use.

    Attributes:
        forecast: all that is known of the merge, tensor by tensor.
    """

    forecast: Forecast

    @property
    def experts(self) -> list[Expert]:
        """Norm, mean, least and largest coefficient of each expert, by model."""
        return self.forecast.summary.experts

    @property
    def coefficients(self) -> dict[str, float]:
        """λ_t by expert; the mean over the parameters, if it varies."""
        return {str(expert.model): expert.mean for expert in self.experts}

    @property
    def warnings(self) -> list[str]:
        """What to look at before you merge, one sentence each."""
        it, sentences = self.forecast, warnings(self.forecast.summary)
        if it.summary.by_direction:
            sentences += moved_far(it.experts, it.survey.moved)
        return sentences + [
            f"{tensor} does not count towards the coefficients, because its vocabularies differ."
            for tensor in it.survey.left_out
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON types, as ``mergekit-metagpt coefficients --json`` does."""
        it = self.forecast
        bounds = tables.bounds(it).items()
        return {
            "method": it.method.spec.name,
            "base": str(it.base),
            **it.summary.as_json(),
            "moved": it.survey.moved,
            "cosines": it.survey.cosines,
            "bound": {key: value if math.isfinite(value) else None for key, value in bounds},
        }

    def plot(self) -> "Figure":
        """Draw the coefficients, those of each layer, and the cosines; needs matplotlib."""
        it, name = self.forecast, self.forecast.method.spec.name
        return plots.coefficients_figure(name, it.base, it.summary, it.survey.cosines)

    def shown(self) -> tuple[str, Summary, RenderableType]:
        """Return what the command ``coefficients`` prints."""
        it, summary = self.forecast, self.forecast.summary
        chosen = f"granularity {summary.granularity}, exponent {summary.exponent}"
        names = short_names(it.experts, tables.LONGEST_NAME)
        moved = [f"{n} {part:.2%}" for n, part in zip(names, it.survey.moved or (), strict=False)]
        bounds = tables.bounds(it)
        shown = Group(
            tables.coefficients_table(summary),
            *([Text(f"Moved, of the base's length: {', '.join(moved)}\n")] if moved else []),
            tables.cosines_table(it.survey),
            Text(
                "The paper's bound on the average loss difference, relative to MetaGPT's for the "
                "whole model",
                "bold",
            ),
            tables.table(
                {
                    "coefficients": [tables.BOUNDS[key] for key in bounds],
                    "bound": [f"{value:.3f}" for value in bounds.values()],
                }
            ),
        )
        return f"{it.method.spec.name}, {chosen}; base {it.base}", summary, shown


@dataclass(frozen=True, repr=False)
class Merged(Shown):
    """A merge that is complete.

    Attributes:
        path: its directory.
        summary: the coefficients that it used.
        record: the content of its metagpt.json.
    """

    path: Path
    summary: Summary
    record: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """What to look at before you rely on it, one sentence each."""
        return warnings(self.summary)

    def shown(self) -> tuple[str, Summary, RenderableType]:
        """Return what the command ``merge`` prints."""
        return f"Merged into {self.path}", self.summary, tables.coefficients_table(self.summary)
