"""Tables and JSON that show what a merge will do, or has done, and why."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.core.coefficients import bound, bound_of_parts, scaling_coefficients
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.method.advice import moved_far, share, warnings
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast

# The choices of λ whose bounds are compared, by their keys in JSON.
_BOUNDS = {
    "merge": "this merge",
    "metagpt": "MetaGPT",
    "uniform": "plain average",
    "0.3": "0.3 each",
    "1.0": "1.0 each",
}

_MUCH = 0.8  # of all task vectors, on average

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 16
_LONGEST_NAME = 24


def as_json(forecast: Forecast) -> dict[str, Any]:
    """Return the measurements and coefficients of a merge as JSON types.

    Everything except moved, the cosines and bounds is also in the ``metagpt.json`` of the merge,
    under the same keys.
    """
    summary = forecast.summary.as_json()
    for expert, part in zip(summary["experts"], kept(forecast), strict=True):
        expert["kept"] = part
    return {
        "method": forecast.method.spec.name,
        "base": str(forecast.base),
        **summary,
        "moved": forecast.survey.moved,
        "cosines": forecast.survey.cosines,
        "bound": {k: v if math.isfinite(v) else None for k, v in bounds(forecast).items()},
    }


def bounds(forecast: Forecast) -> dict[str, float]:
    """Return the bound of Theorem 8 for this merge and for usual choices of λ.

    All bounds are relative to the least one that a single set of λ for the whole model can
    reach, that of Theorem 10. There is no bound for this merge if it is not a sum of the
    surveyed task vectors: with a sparsified method, or if slices move layers.
    """
    products = forecast.survey.products or ()
    count = len(forecast.experts)
    choices = {
        "metagpt": scaling_coefficients(forecast.survey.model),
        "uniform": [1 / count] * count,
        "0.3": [0.3] * count,
        "1.0": [1.0] * count,
    }
    values = {name: bound(products, coefficients) for name, coefficients in choices.items()}
    least = values["metagpt"]
    parts = _parts(forecast)
    if parts is not None:
        values = {"merge": bound_of_parts(parts), **values}
    # With one expert, or equal ones, the merge can reach every expert: the least bound is 0.
    return {
        name: value / least if least else (math.inf if value else 1.0)
        for name, value in values.items()
    }


def kept(forecast: Forecast) -> list[float | None]:
    """Return how much of each task vector τ_t is in the merged one M: ⟨M, τ_t⟩ / ‖τ_t‖².

    It is None where M is not a sum of the surveyed task vectors.
    """
    parts = _parts(forecast)
    if parts is None:
        return [expert.kept for expert in forecast.summary.experts]
    inside = [
        [math.fsum(c * gram[j][t] for j, c in enumerate(coefficients)) for t in range(len(gram))]
        for gram, coefficients in parts
    ]
    norms = [math.fsum(gram[t][t] for gram, _ in parts) for t in range(len(forecast.experts))]
    return [
        math.fsum(row[t] for row in inside) / norm if norm else 0.0 for t, norm in enumerate(norms)
    ]


def _parts(forecast: Forecast) -> list[tuple[Sequence[Sequence[float]], list[float]]] | None:
    """Return inner products and coefficients of each surveyed tensor, if all are merged in place.

    Otherwise, with a sparsified method, or with matrices of coefficients, return None.
    """
    merged = {t.name: t for t in forecast.tensors if set(t.inputs.values()) == {t.name}}
    grams = forecast.survey.grams or {}
    if not forecast.method.is_plain or grams.keys() - merged.keys():
        return None
    if any(tensor.entry.directions for tensor in forecast.tensors):
        return None
    return [
        (gram, [merged[name].scale * c for c in forecast.summary.row(merged[name].entry)])
        for name, gram in grams.items()
    ]


def forecast_warnings(forecast: Forecast) -> list[str]:
    """Return the warnings about the coefficients, one sentence each."""
    found = warnings(forecast.summary)
    if forecast.summary.by_direction:
        found += moved_far(forecast.experts, forecast.survey.moved)
    return found + [
        f"{tensor} does not count towards the coefficients, because its vocabularies differ."
        for tensor in forecast.survey.left_out
    ]


def forecast_tables(forecast: Forecast) -> RenderableType:
    """Return everything that ``mergekit-metagpt coefficients`` shows."""
    names = short_names(forecast.experts, _LONGEST_NAME)
    summary = forecast.summary
    exponents = sorted({entry.exponent for entry in summary.entries})
    return Group(
        Text(
            f"{forecast.method.spec.name}, granularity {' and '.join(summary.granularities)}, "
            f"exponent {' and '.join(f'{exponent:g}' for exponent in exponents)}; "
            f"base {forecast.base}\n"
        ),
        coefficients_table(summary, kept(forecast)),
        *_how_far(forecast),
        Text("Cosines of the task vectors", "bold"),
        matrix(names, forecast.survey.cosines),
        Text(
            "The paper's bound on the average loss difference, relative to MetaGPT's for the "
            "whole model",
            "bold",
        ),
        _bounds_table(forecast),
    )


def _how_far(forecast: Forecast) -> list[Text]:
    """Say how far each expert moved, relative to the length of the base."""
    moved = forecast.survey.moved
    if moved is None:
        return []
    names = short_names(forecast.experts, _LONGEST_NAME)
    parts = (f"{name} {part:.2%}" for name, part in zip(names, moved, strict=True))
    return [Text(f"Moved, of the base's length: {', '.join(parts)}\n")]


def survey_tables(survey: Survey) -> RenderableType:
    """Return what a survey with inner products says of whole models."""
    names = short_names(survey.experts, _LONGEST_NAME)
    table = _of_experts("‖τ‖", "λ, whole model")
    shares = scaling_coefficients(survey.model)
    for name, norm, coefficient in zip(names, survey.model, shares, strict=True):
        table.add_row(Text(name), f"{math.sqrt(norm):.6g}", share(coefficient))
    return Group(table, Text("Cosines of the task vectors", "bold"), matrix(names, survey.cosines))


def coefficients_table(
    summary: Summary, kept: Sequence[float | None] | None = None
) -> RenderableType:
    """Return the coefficients that a merge uses, for each expert.

    Args:
        summary: the coefficients.
        kept: how much of each task vector is in the merge, if the merge does not measure it.
    """
    parts = kept or [expert.kept for expert in summary.experts]
    known = [part for part in parts if part is not None]
    by_direction = summary.by_direction
    columns = ["‖τ‖"]
    if not by_direction:
        columns += ["mean λ", "least", "largest"] if summary.varies else ["λ"]
    columns += ["kept"] if known else []
    columns += ["least", "largest"] if by_direction else []
    table = _of_experts(*columns)
    if summary.varies and summary.layers:
        table.add_column("kept by layer" if by_direction else "λ by layer", no_wrap=True)
    for t, (name, expert) in enumerate(
        zip(short_names(summary.ids, _LONGEST_NAME), summary.experts, strict=True)
    ):
        cells = [name, f"{expert.norm:.4g}"]
        if not by_direction:
            cells.append(share(expert.mean))
            cells += [share(expert.least), share(expert.largest)] if summary.varies else []
        cells += [f"{known[t]:.1%}"] if known else []
        cells += [f"{expert.least:.1%}", f"{expert.largest:.1%}"] if by_direction else []
        cells.append(bar([row[t] for row in summary.kept_by_layer or summary.layers]))
        table.add_row(*map(Text, cells[: len(table.columns)]))
    heading = "What the merge keeps" if by_direction else "Scaling coefficients"
    caption = [Text(_what_is_kept(known, summary))] if known else []
    return Group(Text(heading, "bold"), table, *caption)


def _of_experts(*columns: str) -> Table:
    """Return an empty table whose rows fold long names, so that they cut no number."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("expert", overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _what_is_kept(kept: Sequence[float], summary: Summary) -> str:
    """Say it in words: how directions are merged, or that directions may keep more."""
    words = (
        f"kept: how much of each task vector is in the merge; {sum(kept):.2f} of {len(kept)} in "
        "all."
    )
    if summary.decided and summary.stretch is not None:
        found, directions = summary.decided
        words += (
            f" The coefficients decide in {found:,} of {directions:,} directions; elsewhere the "
            f"experts are added up. The merge moves {summary.stretch:.2f} times as far as "
            "orthogonal experts would together."
        )
    elif sum(kept) < _MUCH * len(kept):
        words += " Granularity direction may keep more."
    return words + "\n"


def matrix(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Table:
    """Return a square matrix as a table; rows show their names, columns show numbers."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", min_width=8)
    for number in range(len(names)):
        table.add_column(str(number + 1), justify="right", overflow="fold")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        cells = (f"{round(value, 2) + 0.0:.2f}" for value in row)
        table.add_row(str(number + 1), Text(name), *cells)
    return table


def bar(shares: Sequence[float]) -> str:
    """Return numbers as one character each, of 0 and 1 at the ends; average neighbours of many.

    >>> bar([0.0, 0.5, 1.0])
    '▁▅█'
    """
    step = -(-len(shares) // _WIDTH) or 1
    means = [
        sum(part) / len(part)
        for part in (shares[start : start + step] for start in range(0, len(shares), step))
    ]
    last = len(_BARS) - 1
    return "".join(_BARS[max(0, min(int(mean * len(_BARS)), last))] for mean in means)


def _bounds_table(forecast: Forecast) -> Table:
    table = Table(box=box.SIMPLE)
    found = bounds(forecast)
    for key in found:
        table.add_column(_BOUNDS[key], justify="right")
    table.add_row(*(f"{value:.3f}" for value in found.values()))
    return table
