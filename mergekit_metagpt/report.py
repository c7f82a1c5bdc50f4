"""What a merge will do and why, for people and for programs."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.coefficients import bound, scaling_coefficients
from mergekit_metagpt.plan import Plan

# An expert with more than this share leaves next to nothing of the others.
DOMINANT = 0.9

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the measurements and coefficients of a plan as JSON types.

    ``coefficient`` is an expert's share for the whole model; ``groups`` holds the
    coefficients of each layer or tensor, in the order of ``experts``, where they are finer.
    """
    rows = zip(plan.experts, plan.survey.model, plan.coefficients, strict=True)
    return {
        "base": str(plan.base),
        "method": plan.method.spec.name,
        "granularity": plan.granularity,
        "experts": [
            {"model": str(m), "norm": norm**0.5, "squared_norm": norm, "coefficient": coefficient}
            for m, norm, coefficient in rows
        ],
        "cosines": plan.survey.cosines,
        "bound": {k: v if math.isfinite(v) else None for k, v in bounds(plan).items()},
        "tensors": len(plan.tensors),
        "parameters": plan.survey.parameters,
        "groups": {name: list(row) for name, row in plan.groups.items()},
    }


def bounds(plan: Plan) -> dict[str, float]:
    """Return the bound of Theorem 8 for usual choices of λ, relative to that of MetaGPT."""
    products = plan.survey.products or ()
    count = len(plan.experts)
    choices = {
        "metagpt": scaling_coefficients(plan.survey.model),
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


def warnings(plan: Plan) -> list[str]:
    """Return a sentence for each thing about the coefficients that should make one think."""
    found = []
    for model, norm, share in zip(plan.experts, plan.survey.model, plan.coefficients, strict=True):
        if share > DOMINANT and len(plan.experts) > 1:
            found.append(
                f"{model} holds {share:.1%} of the merge, since coefficients grow with the square "
                "of the norm: the others hardly count. Give it a smaller weight (its prior), or "
                "try exponent: 1."
            )
        if norm == 0:
            found.append(f"{model} is equal to the base, and gets no share of the merge.")
    for tensor in plan.survey.left_out:
        found.append(
            f"{tensor} does not count towards the coefficients, since its vocabularies differ."
        )
    return found


def tables(plan: Plan) -> RenderableType:
    """Return everything that ``mergekit-metagpt coefficients`` shows."""
    names = short_names([str(model) for model in plan.experts])
    parts: list[RenderableType] = [
        f"{plan.method.spec.name}, granularity {plan.granularity}, exponent {plan.exponent:g}; "
        f"base {plan.base}",
        "",
        Text("Scaling coefficients", "bold"),
        _coefficients(plan, names),
        Text("Cosines of the task vectors", "bold"),
        matrix(names, plan.survey.cosines),
        Text("The paper's bound on the average loss difference, relative to MetaGPT", "bold"),
        _bounds(plan),
    ]
    return Group(*parts)


def layer_shares(plan: Plan) -> list[list[float]]:
    """Return for each layer, first to last, the T shares that its own norms would give."""
    rows = sorted(plan.survey.layers.items(), key=lambda item: _in_order(item[0]))
    return [scaling_coefficients(norms, plan.priors, plan.exponent) for _, norms in rows]


def _in_order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def short_names(models: Sequence[str]) -> list[str]:
    """Return the last part of each name, or the whole names where two would be the same.

    >>> short_names(["TIGER-Lab/MAmmoTH-7B", "/models/chat"])
    ['MAmmoTH-7B', 'chat']
    """
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return short if len(set(short)) == len(models) else list(models)


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


def _coefficients(plan: Plan, names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("expert", overflow="fold")
    table.add_column("‖τ‖", justify="right")
    table.add_column("λ", justify="right")
    table.add_column("share per layer, first to last", no_wrap=True)
    shares = layer_shares(plan)
    rows = zip(names, plan.survey.model, plan.coefficients, strict=True)
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


def _bounds(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("MetaGPT", "plain average", "0.3 each", "1.0 each"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" for value in bounds(plan).values()))
    return table
