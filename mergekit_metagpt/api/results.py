"""What the Python functions return: figures, a table for notebooks, and a plot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference

from mergekit_metagpt.measure import survey as measured
from mergekit_metagpt.method.advice import share, warnings
from mergekit_metagpt.method.summary import Entry, Expert, Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast
from mergekit_metagpt.report.html import coefficients_html
from mergekit_metagpt.report.tables import as_json, forecast_warnings, kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Survey:
    """The task vectors of whole models, measured.

    Attributes:
        base: θ_0.
        figures: norms and inner products for each tensor, and their sums.
        text: the content of the survey's file.
    """

    base: ModelReference
    figures: measured.Survey
    text: str = field(repr=False)

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
        experts, norms = self.figures.experts, self.figures.model
        priors = (1.0,) * len(experts)
        size = self.figures.parameters
        return Summary([Entry("model", "model", experts, norms, priors, 2.0, size)])

    def save(self, path: Path | str) -> None:
        """Write the survey to a file, which commands and functions take as ``survey``."""
        Path(path).write_text(self.text, encoding="utf-8")

    def plot(self) -> "Figure":
        """Draw the coefficients of whole models, and the cosines; needs matplotlib."""
        from mergekit_metagpt.report.plots import coefficients_figure

        cosines = _ordered(self.figures, self.summary)
        return coefficients_figure("metagpt", self.base, self.summary, cosines)

    @property
    def _title(self) -> str:
        return f"Survey of {len(self.experts)} experts of {self.base}"

    def __repr__(self) -> str:
        return _line(self._title, self.summary)

    def _repr_html_(self) -> str:
        return coefficients_html(
            self._title,
            self.summary,
            cosines=_ordered(self.figures, self.summary),
        )


@dataclass(frozen=True)
class Plan:
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

        found = self.forecast
        return coefficients_figure(
            found.method.spec.name, found.base, found.summary, found.survey.cosines
        )

    @property
    def _title(self) -> str:
        found = self.forecast
        return f"{found.method.spec.name}, granularity {' and '.join(found.summary.granularities)}"

    def __repr__(self) -> str:
        return _line(self._title, self.forecast.summary)

    def _repr_html_(self) -> str:
        return coefficients_html(
            self._title,
            self.forecast.summary,
            kept=kept(self.forecast),
            cosines=self.forecast.survey.cosines,
            notes=self.warnings,
        )


@dataclass(frozen=True)
class Merged:
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

    @property
    def _title(self) -> str:
        return f"Merged into {self.path}"

    def __repr__(self) -> str:
        return _line(self._title, self.summary)

    def _repr_html_(self) -> str:
        return coefficients_html(self._title, self.summary, notes=self.warnings)


def _line(title: str, summary: Summary) -> str:
    shares = zip(short_names(summary.ids), summary.experts, strict=True)
    return f"<{title}: {', '.join(f'{name} {share(expert.mean)}' for name, expert in shares)}>"


def _ordered(survey: measured.Survey, summary: Summary) -> list[list[float]]:
    return survey.in_order_of(summary.ids).cosines
