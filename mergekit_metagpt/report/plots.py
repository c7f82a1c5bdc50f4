"""Figures; matplotlib is imported when the first one is drawn.

To add a figure: a public function that takes numbers, draws on the axes of ``_figure`` and
returns the figure. The command that offers it calls ``require_plotting`` before it starts any
work.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

    from mergekit_metagpt.diagnosis.linearity import Linearity

# Colour-blind readers can tell these colours apart (Okabe and Ito). Neighbours differ in grey, too.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#000000", "#CC79A7",
)  # fmt: skip
_SERIES = ((_COLOURS[0], "o"), (_COLOURS[4], "s"), (_COLOURS[2], "^"))

_PANEL = (3.6, 3.1)  # inches
_MOST_COLUMNS = 3
_LONGEST_NAME = 24
_LONGEST_BASE = 60
_FEW_LAYERS = 24  # up to which each has a marker
_MOST_NUMBERS = 12  # the cells of a matrix with more rows show no numbers


def require_plotting(path: Path) -> None:
    """Raise before the work starts if the figure could not be written after it.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the path's directory does not exist or its suffix names no format.
    """
    formats = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"A plot cannot be written as {path.name}; name it {path.stem}.png.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The directory of {path} does not exist; create it first.")


def diagnosis_figure(
    names: Sequence[str], linearities: Sequence["Linearity"], cosines: Sequence[Sequence[float]]
) -> "Figure":
    """Draw figure 4 of the paper: outputs along each task vector, and the cosines.

    Args:
        names: T experts.
        linearities: their outputs, in that order.
        cosines: T x T cosines of their task vectors, in that order.
    """
    names = short_names(names, _LONGEST_NAME)
    columns = min(len(names), _MOST_COLUMNS)
    rows = -(-len(names) // columns)
    figure = _figure(columns + 1.2, rows)
    left, right = cast("Sequence[SubFigure]", figure.subfigures(1, 2, width_ratios=(columns, 1.2)))
    for number, (name, linearity) in enumerate(zip(names, linearities, strict=True), 1):
        ax = left.add_subplot(rows, columns, number)
        _draw_outputs(ax, linearity)
        fit = f"R² = {linearity.r_squared:.3f}" if linearity.moves else "does not move"
        ax.set_title(f"{name}: {fit}", fontsize=10)
    left.axes[0].legend(*_legend(), fontsize=8)
    _draw_matrix(right.add_subplot(), names, cosines)
    right.axes[0].set_title("Cosines of the task vectors", fontsize=10)
    return figure


def coefficients_figure(
    method: str, base: object, summary: Summary, cosines: Sequence[Sequence[float]]
) -> "Figure":
    """Draw each expert's coefficient, the coefficients by layer, and the cosines.

    If the merge measured it, how much it keeps of each task vector takes the coefficients' place.

    Args:
        method: the merge method, for the title.
        base: θ_0, for the title.
        summary: the coefficients. If they are the same everywhere, there is no panel for
            the layers.
        cosines: T x T cosines of the task vectors, in the order of ``summary.ids``.
    """
    names = short_names(summary.ids, _LONGEST_NAME)
    panels = [(_draw_layers, summary.layers)] if summary.varies and summary.layers else []
    if summary.kept_by_layer:
        panels = [(_draw_kept, summary.kept_by_layer)]
    widths = (1, *(1.6 for _ in panels), 1.4)
    figure = _figure(4.2 * sum(widths) / 4, 1.1 + len(names) / 12)
    granularity = " and ".join(summary.granularities)
    figure.suptitle(titled(f"{method}, granularity {granularity}", base), fontsize=11)
    means, *by_layer, matrix = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_means(means, names, summary)
    for ax, (draw, layers) in zip(by_layer, panels, strict=True):
        draw(ax, layers)
    _draw_matrix(matrix, names, cosines)
    matrix.set_title("Cosines of the task vectors", fontsize=10)
    return figure


def comparison_figure(choices: Sequence[tuple[str, Summary]], title: str = "") -> "Figure":
    """Draw the coefficients by layer of several choices, one panel each, on one scale.

    Args:
        choices: the title of each panel, and the coefficients; all have the same experts. Where
            every direction has its own, how much is kept of each expert takes their place.
        title: of the figure.
    """
    names = short_names(choices[0][1].ids, _LONGEST_NAME)
    columns = min(len(choices), _MOST_COLUMNS)
    rows = -(-len(choices) // columns)
    figure = _figure(columns, rows)
    panels = [
        summary.kept_by_layer or summary.layers or [[expert.mean for expert in summary.experts]]
        for _, summary in choices
    ]
    for number, ((choice, _), layers) in enumerate(zip(choices, panels, strict=True), 1):
        ax = figure.add_subplot(rows, columns, number)
        _draw_layers(ax, layers)
        ax.set_ylim(0, max(sum(row) for panel in panels for row in panel) or 1)
        if number % columns == 1 % columns:
            ax.set_ylabel("of all experts")
        ax.set_title(choice, fontsize=10)
    figure.suptitle(title, fontsize=11)
    handles: Any = figure.axes[0].containers
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=columns)
    return figure


def titled(choice: str, base: object) -> str:
    """Return the title of a figure: what was chosen, and the short name of the base."""
    (base,) = short_names([base], _LONGEST_BASE)
    return f"{choice}; base {base}"


def _draw_means(ax: "Axes", names: Sequence[str], summary: Summary) -> None:
    """Draw a bar for each expert, and a line from its least to its largest coefficient."""
    places = range(len(names))
    means = [expert.mean for expert in summary.experts]
    most = max(expert.largest for expert in summary.experts)
    ax.barh(places, means, color=_share_colours(len(names)))
    for t, expert in enumerate(summary.experts):
        if summary.varies:
            ax.plot((expert.least, expert.largest), (t, t), color="grey", linewidth=2)
        ax.text(expert.largest + 0.02 * most, t, f"{expert.mean:.3g}", va="center", fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * most or 1)  # with room for the numbers
    title = "Mean coefficient λ" if summary.varies else "Coefficients λ"
    ax.set_title("Kept" if summary.kept_by_layer else title, fontsize=10)


def _draw_layers(ax: "Axes", layers: Sequence[Sequence[float]]) -> None:
    """Draw the coefficients of each layer on top of each other, the first expert's on top."""
    upper = list(map(sum, layers))
    ax.set_ylim(0, max(upper) or 1)
    for t, colour in enumerate(_share_colours(len(layers[0]))):
        own = [row[t] for row in layers]
        upper = [a - b for a, b in zip(upper, own, strict=True)]
        edges: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.3}  # for printing in grey
        ax.bar(range(len(layers)), own, 1.0, upper, color=colour, **edges)
    ax.set_xlabel("layer")
    ax.locator_params(axis="x", integer=True)
    ax.margins(x=0)
    ax.set_title("λ by layer", fontsize=10)


def _draw_kept(ax: "Axes", layers: Sequence[Sequence[float]]) -> None:
    """Draw for each layer how much of each task vector is in the merge."""
    marker = "." if len(layers) <= _FEW_LAYERS else ""
    for t, colour in enumerate(_share_colours(len(layers[0]))):
        ax.plot(range(len(layers)), [row[t] for row in layers], color=colour, marker=marker)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_xlabel("layer")
    ax.locator_params(axis="x", integer=True)
    ax.set_title("Kept of each task vector", fontsize=10)


def _share_colours(count: int) -> Sequence[str | tuple[float, ...]]:
    """Return a colour for each expert."""
    from matplotlib import colormaps

    if count <= len(_COLOURS):
        return _COLOURS[:count]
    return [colormaps["viridis"](t / (count - 1)) for t in range(count)]


def _figure(columns: float, rows: float) -> "Figure":
    """Return an empty figure of the given size in panels, without a window or pyplot state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from mergekit_metagpt.report.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(
            "Plots need matplotlib; run: pip install 'mergekit-metagpt[plot]'"
        ) from None
    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_outputs(ax: "Axes", linearity: "Linearity") -> None:
    """Draw three outputs z(α) − z(0), and the straight lines to their ends."""
    places = linearity.outputs.shape[1]
    for at, (colour, marker) in zip((0, places // 2, places - 1), _SERIES, strict=True):
        # Index 1 is the token that the expert prefers. It is the most likely of the four to move.
        output = linearity.outputs[:, at, 1]
        shifted = (output - output[0]).tolist()
        ax.plot(linearity.alphas, shifted, color=colour, marker=marker, markersize=4, linewidth=1.5)
        ax.plot((0, 1), (0, shifted[-1]), color=colour, linestyle="--", linewidth=1)
    ax.set_xlabel("α")
    ax.set_ylabel("logit − logit of the base")
    ax.grid(alpha=0.3)


def _legend() -> tuple[list["Line2D"], list[str]]:
    from matplotlib.lines import Line2D

    styles = [Line2D([], [], color="black", linestyle=style) for style in ("-", "--")]
    return styles, ["output", "straight line"]


def _draw_matrix(ax: "Axes", names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Draw a T x T matrix of values from −1 to 1."""
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    # Only rows show the names. Columns show numbers, because long names would overlap.
    numbers = range(1, len(names) + 1)
    ax.set_xticks(range(len(names)), [str(number) for number in numbers], fontsize=8)
    labels = [f"{name}  {n}" for n, name in zip(numbers, names, strict=True)]
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    if len(names) > _MOST_NUMBERS:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
