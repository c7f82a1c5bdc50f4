"""Figures; matplotlib is imported when the first one is drawn.

To add one: a public function that takes numbers, draws on the axes of ``_figure`` and returns it.
The command that offers it calls ``require_plotting`` before it starts any work.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import short_names
from mergekit_metagpt.report.tables import COSINES, LONGEST_NAME, two_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A result of ``diagnosis``: its outputs along a task vector, and how straight they are.
Linearity = Any

# Colour-blind readers can tell these colours apart (Okabe and Ito). Neighbours differ in grey, too.
_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#000000", "#CC79A7",
)  # fmt: skip
_SERIES = ((_COLOURS[0], "o"), (_COLOURS[4], "s"), (_COLOURS[2], "^"))

_PANEL = (3.6, 3.1)  # inches
_NOTEBOOK_DPI = 75  # enough to read, and a saved notebook stays small
_LONGEST_BASE = 60
_MOST_NUMBERS = 12  # the cells of a matrix with more rows show no numbers


def require_plotting(path: Path | None) -> None:
    """Raise an error before the work starts if a figure could not be written after it."""
    if path is None:
        return
    formats = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"A plot cannot be written as {path.name}; name it {path.stem}.png.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The directory of {path} does not exist; create it first.")


def diagnosis_figure(
    names: Sequence[str], linearities: Sequence[Linearity], cosines: Sequence[Sequence[float]]
) -> "Figure":
    """Draw figure 4 of the paper: outputs along T task vectors, and their T x T cosines."""
    names = short_names(names, LONGEST_NAME)
    figure, panels = _panels(len(names) + 1, 4)
    for ax, name, linearity in zip(panels, names, linearities, strict=False):
        _draw_outputs(ax, linearity)
        fit = linearity.r_squared
        shown = "does not move" if fit is None else f"R² = {fit:.3f}"
        ax.set_title(f"{name}: {shown}", fontsize=10)
    panels[0].legend(panels[0].lines[:2], ["output", "straight line"], fontsize=8)
    _draw_cosines(panels[-1], names, cosines)
    return figure


def coefficients_figure(
    method: str, base: object, summary: Summary, cosines: Sequence[Sequence[float]]
) -> "Figure":
    """Draw coefficients, or what is kept of each expert, by layer if they vary; and the cosines.

    The T x T cosines are in the order of ``summary.ids``.
    """
    names = short_names(summary.ids, LONGEST_NAME)
    layers = summary.kept_by_layer or (summary.layers if summary.varies else [])
    widths = (1, 1.6, 1.4) if layers else (1, 1.4)
    figure = _figure(4.2 * sum(widths) / 4, 1.1 + len(names) / 12)
    figure.suptitle(titled(f"{method}, granularity {summary.granularity}", base), fontsize=11)
    means, *by_layer, matrix = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_means(means, names, summary)
    for ax in by_layer:
        _draw_layers(ax, layers, max(map(sum, layers)))
        ax.set_title("Kept by layer" if summary.kept_by_layer else "λ by layer", fontsize=10)
    _draw_cosines(matrix, names, cosines)
    return figure


def comparison_figure(choices: Sequence[tuple[str, Summary]], title: str = "") -> "Figure":
    """Draw the coefficients by layer of several choices, or what they keep, on one scale.

    Each choice is a title and a summary; all have the same experts.
    """
    figure, panels = _panels(len(choices), 3)
    drawn = [
        summary.kept_by_layer or summary.layers or [[expert.mean for expert in summary.experts]]
        for _, summary in choices
    ]
    for ax, (choice, _), layers in zip(panels, choices, drawn, strict=True):
        _draw_layers(ax, layers, max(sum(row) for its in drawn for row in its))
        ax.set_title(choice, fontsize=10)
    figure.supylabel("of all experts", fontsize=10)
    figure.suptitle(title, fontsize=11)
    names = short_names(choices[0][1].ids, LONGEST_NAME)
    handles: Any = panels[0].containers
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def titled(choice: str, base: object) -> str:
    """Return the title of a figure: what was chosen, and the short name of the base."""
    (base,) = short_names([base], _LONGEST_BASE)
    return f"{choice}; base {base}"


def _draw_means(ax: "Axes", names: Sequence[str], summary: Summary) -> None:
    """Draw a bar for each expert, and a line from its least to its largest coefficient."""
    experts, places = summary.experts, range(len(names))
    # A mean may be rounded out of the range.
    errors = [(max(0, it.mean - it.least), max(0, it.largest - it.mean)) for it in experts]
    ranges: Any = {"xerr": [*zip(*errors, strict=True)], "ecolor": "grey"} if summary.varies else {}
    means = [expert.mean for expert in experts]
    bars = ax.barh(places, means, color=_colours(len(names)), **ranges)
    ax.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(expert.largest for expert in experts) or 1)  # room for the numbers
    title = "Mean coefficient λ" if summary.varies else "Coefficients λ"
    ax.set_title("Kept" if summary.kept_by_layer else title, fontsize=10)


def _draw_layers(ax: "Axes", layers: Sequence[Sequence[float]], most: float) -> None:
    """Draw the figures of each layer as a stack, the first expert's on top."""
    upper, places = list(map(sum, layers)), range(len(layers))
    for colour, own in zip(_colours(len(layers[0])), zip(*layers, strict=True), strict=True):
        upper = [a - b for a, b in zip(upper, own, strict=True)]
        # The edges are for printing in grey.
        ax.bar(places, own, 1.0, upper, color=colour, edgecolor="white", linewidth=0.3)
    ax.set_ylim(0, most or 1)
    ax.margins(x=0)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_xlabel("layer")
    ax.locator_params(axis="x", integer=True)


def _draw_outputs(ax: "Axes", linearity: Linearity) -> None:
    """Draw z(α) − z(0) of the likeliest token of three prompts, and straight lines to the ends."""
    outputs = (linearity.outputs - linearity.outputs[0])[:, :, 0].T.tolist()
    for at, (colour, marker) in zip((0, len(outputs) // 2, -1), _SERIES, strict=True):
        alphas = [step / (len(outputs[at]) - 1) for step in range(len(outputs[at]))]
        ax.plot(alphas, outputs[at], color=colour, marker=marker, markersize=4, linewidth=1.5)
        ax.plot((0, 1), (0, outputs[at][-1]), color=colour, linestyle="--", linewidth=1)
    ax.set_xlabel("α")
    ax.set_ylabel("logit − logit of the base")
    ax.grid(alpha=0.3)


def _draw_cosines(ax: "Axes", names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Draw a T x T matrix of values from −1 to 1."""
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    # Only rows show the names. Columns show numbers, because long names would overlap.
    labels = [f"{name}  {number}" for number, name in enumerate(names, 1)]
    ax.set_xticks(range(len(names)), [str(number + 1) for number in range(len(names))], fontsize=8)
    ax.set_yticks(range(len(names)), labels, fontsize=8)
    ax.set_title(COSINES, fontsize=10)
    for i, row in enumerate(values if len(names) <= _MOST_NUMBERS else []):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(j, i, two_digits(value), color=colour, fontsize=8, ha="center", va="center")


def _colours(count: int) -> Sequence[str | tuple[float, ...]]:
    from matplotlib import colormaps

    if count <= len(_COLOURS):
        return _COLOURS[:count]
    return [colormaps["viridis"](t / (count - 1)) for t in range(count)]


def _panels(count: int, columns: int) -> "tuple[Figure, list[Axes]]":
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = _figure(columns, rows)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _figure(columns: float, rows: float) -> "Figure":
    """Return an empty figure of the given size in panels, without a window or pyplot state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(
            "Plots need matplotlib; run: pip install 'mergekit-metagpt[plot]'"
        ) from None

    class ShownFigure(Figure):
        """A figure that notebooks show, although it is not one of pyplot's."""

        def _repr_png_(self) -> bytes:
            image = BytesIO()
            self.savefig(image, format="png", dpi=_NOTEBOOK_DPI)
            return image.getvalue()

    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    return ShownFigure(figsize=size, dpi=150, layout="constrained")
