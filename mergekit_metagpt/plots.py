"""Figures, written to files; matplotlib is imported when the first one is drawn.

To add a figure: a public function that takes numbers and a path, draws on the axes of
``_figure`` and ends with ``figure.savefig(path)``. The command that offers it calls
``require_plotting`` before it starts any work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mergekit_metagpt.linearity import Linearity

# Told apart by the colour-blind (Okabe and Ito), and by their markers in print.
_SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))

_PANEL = (3.6, 3.1)  # inches
_LONGEST_NAME = 24
_MOST_NUMBERS = 12  # rows of a matrix up to which the cells hold their numbers


def require_plotting(path: Path) -> None:
    """Refuse at once what would fail after an hour.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the path's directory does not exist or its suffix names no format.
    """
    formats = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"A plot cannot be written as {path.name}; name it {path.stem}.png.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The directory of {path} does not exist; create it first.")


def plot_diagnosis(
    path: Path,
    names: Sequence[str],
    linearities: Sequence["Linearity"],
    cosines: Sequence[Sequence[float]],
) -> None:
    """Draw figure 4 of the paper: outputs along each task vector, and the cosines.

    Args:
        path: where the picture is written; the suffix says the format.
        names: T experts.
        linearities: their outputs, in that order.
        cosines: T x T cosines of their task vectors, in that order.
    """
    panels = len(names) + 1
    columns = min(panels, 3 if panels <= 6 else 4)
    figure = _figure(columns, -(-panels // columns))
    axes = [figure.add_subplot(-(-panels // columns), columns, n + 1) for n in range(panels)]
    for ax, name, linearity in zip(axes, names, linearities, strict=False):
        _draw_outputs(ax, name, linearity)
    _draw_matrix(axes[-1], names, cosines)
    axes[-1].set_title("Cosines of the task vectors", fontsize=10)
    figure.savefig(path)


def _figure(columns: int, rows: int) -> "Figure":
    """Return an empty figure for so many panels; it belongs to no window and no pyplot state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(
            "Plots need matplotlib; run: pip install 'mergekit-metagpt[plot]'"
        ) from None
    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_outputs(ax: "Axes", name: str, linearity: "Linearity") -> None:
    """Draw three outputs z(α) − z(0), and the straight lines to their ends."""
    from mergekit_metagpt.linearity import ALPHAS

    places = linearity.outputs.shape[1]
    for at, (colour, marker) in zip((0, places // 2, places - 1), _SERIES, strict=True):
        # The token that the expert prefers: of the four at a place the likeliest to move.
        output = linearity.outputs[:, at, 1]
        shifted = (output - output[0]).tolist()
        ax.plot(ALPHAS, shifted, color=colour, marker=marker, markersize=4, linewidth=1.5)
        ax.plot((0, 1), (0, shifted[-1]), color=colour, linestyle="--", linewidth=1)
    ax.set_title(f"{_short(name)}: R² = {linearity.r_squared:.3f}", fontsize=10)
    ax.set_xlabel("α")
    ax.set_ylabel("logit − logit of the base")
    ax.grid(alpha=0.3)


def _draw_matrix(ax: "Axes", names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Draw a T x T matrix of values from −1 to 1."""
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    labels = [_short(name) for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    if len(names) > _MOST_NUMBERS:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
