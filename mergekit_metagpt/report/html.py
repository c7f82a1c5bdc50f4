"""Tables for notebooks: HTML with the coefficients as bars, without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from mergekit_metagpt.method.advice import share
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names

_BAR = 120, 10  # pixels
_COLOUR = "#0072B2"


def coefficients_html(
    title: str,
    summary: Summary,
    *,
    kept: Sequence[float | None] | None = None,
    cosines: Sequence[Sequence[float]] = (),
    notes: Iterable[str] = (),
) -> str:
    """Return a table of the experts of a merge, and the cosines of their task vectors.

    Args:
        title: its heading.
        summary: the coefficients.
        kept: how much of each task vector is in the merge, if it is known.
        cosines: T x T cosines, in the order of ``summary.ids``.
        notes: sentences to put below.
    """
    names = short_names(summary.ids)
    parts = kept or [expert.kept for expert in summary.experts]
    by_direction = summary.by_direction
    name = "kept" if by_direction else "λ"
    columns = ["expert", "‖τ‖", name, "", *(["least", "largest"] if summary.varies else [])]
    if not by_direction and any(part is not None for part in parts):
        columns.append("kept")
    rows = []
    for name, expert, part in zip(names, summary.experts, parts, strict=True):
        cells = [escape(name), f"{expert.norm:.4g}", share(expert.mean), _bar(expert.mean)]
        cells += [share(expert.least), share(expert.largest)] if summary.varies else []
        cells += ["" if part is None else f"{part:.1%}"] if columns[-1] == "kept" else []
        rows.append(cells)
    body = f"<p><b>{escape(title)}</b></p>{_table(columns, rows)}"
    if len(cosines) > 1:
        numbered = [f"{number}  {escape(name)}" for number, name in enumerate(names, 1)]
        figures = [[f"{round(value, 2) + 0.0:.2f}" for value in row] for row in cosines]
        rows = [[name, *row] for name, row in zip(numbered, figures, strict=True)]
        columns = ["", *map(str, range(1, len(names) + 1))]
        body += f"<p>Cosines of the task vectors</p>{_table(columns, rows)}"
    return body + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bar(part: float) -> str:
    """Return a number from 0 to 1 as a bar; more fills it."""
    width, height = _BAR
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{part:.3f}">'
        f'<rect width="{width}" height="{height}" fill="currentColor" opacity="0.1"/>'
        f'<rect width="{min(part, 1.0) * width:.1f}" height="{height}" fill="{_COLOUR}"/></svg>'
    )
