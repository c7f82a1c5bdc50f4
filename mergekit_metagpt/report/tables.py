"""What a merge will do and why, for people and for programs."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.coefficients import bound, scaling_coefficients
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast

# An expert with more than this share leaves next to nothing of the others.
DOMINANT = 0.9

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32


def as_json(forecast: Forecast) -> dict[str, Any]:
    """Return the measurements and coefficients of a merge as JSON types.

    ``coefficient`` is an expert's share for the whole model; ``groups`` holds the
    coefficients of each layer or tensor, in the order of ``experts``, where they are finer.
    """
    rows = zip(forecast.experts, forecast.survey.model, forecast.coefficients, strict=True)
    return {
        "base": str(forecast.base),
        "method": forecast.method.spec.name,
        "granularity": forecast.granularity,
        "experts": [
            {"model": str(m), "norm": norm**0.5, "squared_norm": norm, "coefficient": coefficient}
            for m, norm, coefficient in rows
        ],
        "cosines": forecast.survey.cosines,
        "bound": {k: v if math.isfinite(v) else None for k, v in bounds(forecast).items()},
        "tensors": len(forecast.tensors),
        "parameters": forecast.survey.parameters,
        "groups": {name: list(row) for name, row in forecast.groups.items()},
    }


def bounds(forecast: Forecast) -> dict[str, float]:
    """Return the bound of Theorem 8 for usual choices of λ, relative to that of MetaGPT."""
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
    # With one expert, or equal ones, the merge can reach every expert: the least bound is 0.
    return {
        name: value / least if least else (math.inf if value else 1.0)
        for name, value in values.items()
    }


def warnings(forecast: Forecast) -> list[str]:
    """Return a sentence for each thing about the coefficients that should make one think."""
    found = []
    experts = zip(forecast.experts, forecast.survey.model, forecast.coefficients, strict=True)
    for model, norm, share in experts:
        if share > DOMINANT and len(forecast.experts) > 1:
            found.append(
                f"{model} holds {share:.1%} of the merge, since coefficients grow with the square "
                "of the norm: the others hardly count. Give it a smaller weight (its prior), or "
                "try exponent: 1."
            )
        if norm == 0:
            found.append(f"{model} is equal to the base, and gets no share of the merge.")
    for tensor in forecast.survey.left_out:
        found.append(
            f"{tensor} does not count towards the coefficients, since its vocabularies differ."
        )
    return found


def tables(forecast: Forecast) -> RenderableType:
    """Return everything that ``mergekit-metagpt coefficients`` shows."""
    names = short_names(forecast.experts)
    parts: list[RenderableType] = [
        f"{forecast.method.spec.name}, granularity {forecast.granularity}, exponent "
        f"{forecast.exponent:g}; base {forecast.base}",
        "",
        Text("Scaling coefficients", "bold"),
        _coefficients(forecast, names),
        Text("Cosines of the task vectors", "bold"),
        matrix(names, forecast.survey.cosines),
        Text("The paper's bound on the average loss difference, relative to MetaGPT", "bold"),
        _bounds(forecast),
    ]
    return Group(*parts)


def layer_shares(forecast: Forecast) -> list[list[float]]:
    """Return for each layer, first to last, the T shares that its own norms would give."""
    rows = sorted(forecast.survey.layers.items(), key=lambda item: _in_order(item[0]))
    return [scaling_coefficients(norms, forecast.priors, forecast.exponent) for _, norms in rows]


def _in_order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def matrix(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Table:
    """Return a table of a square matrix whose rows and columns bear names."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("")
    for number in range(len(names)):
        table.add_column(str(number + 1), justify="right")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        table.add_row(str(number + 1), name, *(f"{round(value, 2) + 0.0:.2f}" for value in row))
    return table


def _coefficients(forecast: Forecast, names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("expert", overflow="fold")
    table.add_column("‖τ‖", justify="right")
    table.add_column("λ", justify="right")
    table.add_column("share per layer, first to last", no_wrap=True)
    shares = layer_shares(forecast)
    rows = zip(names, forecast.survey.model, forecast.coefficients, strict=True)
    for t, (name, norm, coefficient) in enumerate(rows):
        table.add_row(
            name,
            f"{norm**0.5:.4g}",
            f"{coefficient:.4f}"
            if coefficient >= 1e-3 or not coefficient
            else f"{coefficient:.1e}",
            bar([row[t] for row in shares]),
        )
    return table


def bar(shares: Sequence[float]) -> str:
    """Return numbers from 0 to 1 as one character each, neighbours averaged when too many.

    >>> bar([0.0, 0.5, 1.0])
    '▁▅█'
    """
    step = -(-len(shares) // _WIDTH) or 1
    means = [
        sum(part) / len(part)
        for part in (shares[start : start + step] for start in range(0, len(shares), step))
    ]
    return "".join(_BARS[min(int(mean * len(_BARS)), len(_BARS) - 1)] for mean in means)


def _bounds(forecast: Forecast) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("MetaGPT", "plain average", "0.3 each", "1.0 each"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" for value in bounds(forecast).values()))
    return table
