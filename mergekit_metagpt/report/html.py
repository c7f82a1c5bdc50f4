"""Tables for notebooks: HTML with the coefficients as bars, without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.report.tables import COSINES, Columns, expert_columns, matrix_columns

_WIDTH, _HEIGHT = 120, 10  # of a bar, in pixels
_COLOUR = "#0072B2"


def coefficients_html(
    title: str, summary: Summary, cosines: Sequence[Sequence[float]], notes: Iterable[str]
) -> str:
    """Return a table of the experts of a merge, their cosines if known, and notes below.

    The T x T cosines are in the order of ``summary.ids``.
    """
    bars = [_bar(expert.mean) for expert in summary.experts]
    body = f"<p><b>{escape(title)}</b></p>{_table(expert_columns(summary), bars)}"
    if len(cosines) > 1:
        body += f"<p>{COSINES}</p>{_table(matrix_columns(short_names(summary.ids), cosines))}"
    return body + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _table(columns: Columns, bars: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in columns) + "<th></th>" * bool(bars)
    rows = [[escape(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
    rows = [[*row, drawn] for row, drawn in zip(rows, bars, strict=True)] if bars else rows
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bar(part: float) -> str:
    """Return a number from 0 to 1 as a bar; more fills it, and less leaves it empty."""
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{part:.3f}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="currentColor" opacity="0.1"/>'
        f'<rect width="{max(0.0, min(part, 1.0)) * _WIDTH:.1f}" height="{_HEIGHT}" '
        f'fill="{_COLOUR}"/></svg>'
    )
