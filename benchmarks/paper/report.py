"""Print a table of the paper, with measured and published figures side by side."""

import math
from collections.abc import Iterable, Sequence
from itertools import compress
from statistics import fmean

from rich import box
from rich.table import Table as Grid

from benchmarks.paper.scores import Scores
from benchmarks.paper.tables import Row, Table
from mergekit_metagpt.evaluation.scores import normalized_average


def comparison(table: Table, rows: Iterable[Row], scores: Scores) -> Grid:
    """Return a grid with two lines per row: the measured and the published figures.

    The averages of both lines are over the measured columns; each row needs at least one.
    """
    grid = Grid(title=f"Table {table.number}: {table.title}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column("Model", no_wrap=True)
    grid.add_column("", no_wrap=True)
    measured_at_home, published_at_home = _at_home(table, scores)
    averages = ["Abs. Avg", "Nor. Avg"] if published_at_home else ["Avg"]
    for name in (*(column.name for column in table.columns), *averages):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        measured = [scores.stored(row, column) for column in table.columns]
        counted = [not math.isnan(score) for score in measured]
        grid.add_row(row.name, "measured", *_line(measured, measured_at_home, counted))
        grid.add_row("", "published", *_line(row.scores, published_at_home, counted), style="dim")
    grid.caption = "\n".join(_notes(table, scores))
    grid.caption_justify = "left"
    return grid


def _at_home(table: Table, scores: Scores) -> tuple[list[float], list[float]]:
    """Return the scores of each column's expert, measured and published; none for table 5."""
    experts = [(table.experts[column.expert], column) for column in table.columns if column.expert]
    return (
        [scores.stored(row, column) for row, column in experts],
        [row.scores[table.columns.index(column)] for row, column in experts],
    )


def _line(scores: Sequence[float], at_home: Sequence[float], counted: Sequence[bool]) -> list[str]:
    """Return the cells of a line: its scores, and the averages of the counted ones."""
    values = list(compress(scores, counted))
    cells = [_cell(score, 2) for score in (*scores, fmean(values))]
    if at_home:
        cells.append(_cell(normalized_average(values, list(compress(at_home, counted))), 3))
    return cells


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _notes(table: Table, scores: Scores) -> list[str]:
    """Return notes on the figures for the reader, one sentence each."""
    notes = ["Scores in %; averages, also the published ones, are over the columns measured."]
    if any(column.expert for column in table.columns):
        notes.append("Nor. Avg divides by the experts' scores: it waits until they are measured.")
    if scores.limit:
        notes.append(f"Only the first {scores.limit} questions of each task were asked.")
    lacking = [column.name for column in table.columns if not column.tasks]
    if lacking:
        notes.append(f"Not in lm-eval: {', '.join(lacking)}.")
    unsafe = [column.name for column in table.columns if column.runs_code]
    if unsafe and not scores.unsafe_code:
        notes.append(
            f"Not run, since they execute what the model writes: {', '.join(unsafe)}; "
            "--confirm-run-unsafe-code runs them."
        )
    return notes
