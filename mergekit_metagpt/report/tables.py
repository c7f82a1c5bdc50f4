"""What a merge will do, or has done, and why, as tables and JSON."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_metagpt.core.coefficients import bound, scaling_coefficients
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.method.advice import share
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.planning.forecast import Forecast

Columns = Mapping[str, Sequence[str]]

# The choices of λ whose bounds are compared, by their keys in JSON.
BOUNDS = {
    "merge": "this merge",
    "metagpt": "MetaGPT",
    "uniform": "plain average",
    "0.3": "0.3 each",
    "1.0": "1.0 each",
}
COSINES = "Cosines of the task vectors"

_LARGE_PART = 0.8  # of all task vectors, on average

_WORDS = ("weights", "by layer")  # ends of the titles of columns without numbers
_BLOCKS = "▁▂▃▄▅▆▇█"
_LONGEST_BAR = 16
LONGEST_NAME = 24


def bounds(forecast: Forecast) -> dict[str, float]:
    """Return the bound of Theorem 8 for this merge and for usual choices of λ.

    They are relative to that of Theorem 10, the least for a single set of λ. There is none for
    this merge if it does not add up the surveyed task vectors.
    """
    count = len(forecast.experts)
    numbers = {"uniform": 1 / count, "0.3": 0.3, "1.0": 1.0}
    choices = {"metagpt": scaling_coefficients(forecast.survey.model)}
    choices |= {name: [number] * count for name, number in numbers.items()}
    products = forecast.survey.products or ()
    values = {name: bound([(products, choice)]) for name, choice in choices.items()}
    least = values["metagpt"]
    if forecast.in_place is not None:
        values = {"merge": bound(forecast.in_place), **values}
    # With one expert, or equal ones, the merge can reach every expert: the least bound is 0.
    return {k: v / least if least else (math.inf if v else 1.0) for k, v in values.items()}


def expert_columns(summary: Summary) -> Columns:
    """Return what is shown of the experts of a merge."""
    experts, by_direction = summary.experts, summary.by_direction
    kept = [f"{expert.kept:.1%}" for expert in experts if expert.kept is not None]
    columns: dict[str, Sequence[str]] = {
        "expert": short_names(summary.ids, LONGEST_NAME),
        "‖τ‖": [f"{expert.norm:.4g}" for expert in experts],
    }
    if not by_direction:
        columns["mean λ" if summary.varies else "λ"] = [share(expert.mean) for expert in experts]
    elif kept:
        columns["kept"] = kept
    if summary.varies:
        write = "{:.1%}".format if by_direction else share
        columns["least"] = [write(expert.least) for expert in experts]
        columns["largest"] = [write(expert.largest) for expert in experts]
    if kept:
        columns.setdefault("kept", kept)
    layers = summary.kept_by_layer if by_direction else summary.layers
    if summary.varies and layers:
        title = "kept by layer" if by_direction else "λ by layer"
        columns[title] = [bar(parts) for parts in zip(*layers, strict=True)]
    return columns


def two_digits(number: float) -> str:
    """Write a number with two digits, and 0 without a sign."""
    return f"{round(number, 2) + 0.0:.2f}"


def bar(shares: Sequence[float]) -> str:
    """Return numbers as one character each, of 0 and 1 at the ends; average neighbours of many.

    >>> bar([0.0, 0.5, 1.0])
    '▁▅█'
    """
    step = -(-len(shares) // _LONGEST_BAR) or 1
    means = [fmean(shares[start : start + step]) for start in range(0, len(shares), step)]
    heights = [int(mean * len(_BLOCKS)) for mean in means]
    return "".join(_BLOCKS[max(0, min(height, len(_BLOCKS) - 1))] for height in heights)


def table(columns: Columns) -> Table:
    """Return columns, given by their titles, as a terminal shows them."""
    shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, title in enumerate(columns):
        shown.add_column(
            Text(title),
            justify="left" if not number or title.endswith(_WORDS) else "right",
            overflow="fold",  # the widest first, so that no number is cut
            no_wrap=title.endswith("by layer"),
        )
    for cells in zip(*columns.values(), strict=True):
        shown.add_row(*map(Text, cells))
    return shown


def cosines_table(survey: Survey) -> RenderableType:
    """Return the cosines of a survey with inner products, below their title."""
    names = enumerate(short_names(survey.experts, LONGEST_NAME), 1)
    columns = {"": [f"{number}  {name}" for number, name in names]}
    columns |= {str(n): list(map(two_digits, own)) for n, own in enumerate(survey.cosines, 1)}
    return Group(Text(COSINES, "bold"), table(columns))


def coefficients_table(summary: Summary) -> RenderableType:
    """Return the coefficients that a merge uses, for each expert, and what it keeps."""
    heading = "What the merge keeps" if summary.by_direction else "Scaling coefficients"
    kept = [expert.kept for expert in summary.experts if expert.kept is not None]
    caption = [Text(_caption(summary, kept))] if kept else []
    return Group(Text(heading, "bold"), table(expert_columns(summary)), *caption)


def _caption(summary: Summary, kept: Sequence[float]) -> str:
    """Say how directions are merged, or that directions may keep more."""
    words = (
        f"kept: how much of each task vector is in the merge; {sum(kept):.2f} of {len(kept)} in "
        "all."
    )
    if summary.decided and summary.stretch is not None:
        decided, directions = summary.decided
        words += (
            f" The coefficients decide in {decided:,} of {directions:,} directions; elsewhere the "
            f"experts are added up. The merge moves {summary.stretch:.2f} times as far as "
            "orthogonal experts would together."
        )
    elif sum(kept) < _LARGE_PART * len(kept):
        words += " Granularity direction may keep more."
    return f"{words}\n"
