"""What the Python functions return: figures, a table for notebooks, and a plot."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference

from mergekit_metagpt.measure import survey as measured
from mergekit_metagpt.method.advice import share, warnings
from mergekit_metagpt.method.summary import Expert, Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report.html import coefficients_html
from mergekit_metagpt.report.tables import as_json, forecast_warnings, whole_models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Title, coefficients, cosines in the order of ``Summary.ids``, and warnings.
Figures = tuple[str, Summary, Sequence[Sequence[float]], list[str]]


class Shown(ABC):
    """What notebooks show as a table, and other places as a line."""

    @abstractmethod
    def _figures(self) -> Figures:
        """Return what is shown."""

    def __repr__(self) -> str:
        title, summary, *_ = self._figures()
        named = zip(short_names(summary.ids), summary.experts, strict=True)
        return f"<{title}: {', '.join(f'{name} {share(expert.mean)}' for name, expert in named)}>"

    def _repr_html_(self) -> str:
        return coefficients_html(*self._figures())


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
        """The coefficients that Theorem 10 gives whole models."""
        return whole_models(self.figures)

    def plot(self) -> "Figure":
        """Draw the coefficients of whole models, and the cosines; needs matplotlib."""
        from mergekit_metagpt.report.plots import coefficients_figure

        _, summary, cosines, _ = self._figures()
        return coefficients_figure("metagpt", self.base, summary, cosines)

    def _figures(self) -> Figures:
        title = f"Survey of {len(self.experts)} experts of {self.base}"
        return title, self.summary, self.figures.in_order_of(self.summary.ids).cosines, []


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
        return forecast_warnings(self.forecast)

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON types, as ``mergekit-metagpt coefficients --json`` does."""
        return as_json(self.forecast)

    def plot(self) -> "Figure":
        """Draw the coefficients, those of each layer, and the cosines; needs matplotlib."""
        from mergekit_metagpt.report.plots import coefficients_figure

        _, summary, cosines, _ = self._figures()
        return coefficients_figure(
            self.forecast.method.spec.name, self.forecast.base, summary, cosines
        )

    def _figures(self) -> Figures:
        summary = self.forecast.summary
        title = f"{self.forecast.method.spec.name}, granularity {summary.granularity}"
        return title, summary, self.forecast.survey.cosines, self.warnings


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

    def _figures(self) -> Figures:
        return f"Merged into {self.path}", self.summary, (), self.warnings
