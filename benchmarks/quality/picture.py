"""A figure of the results."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.quality.families import Family
from benchmarks.quality.measure import RECIPES
from benchmarks.quality.merges import PLAIN
from benchmarks.quality.report import RIVALS, by_setting, size_of

_MODELS = (*RIVALS, *(f"MetaGPT, {granularity}" for granularity in PLAIN))
# Colour-blind people can tell these colours apart (Okabe and Ito); in print, markers differ.
_SERIES = (("#0072B2", "o", -0.15), ("#D55E00", "s", 0.15))


def draw(families: Sequence[Family], path: Path) -> None:
    """Draw the ALD of the merges: a panel per recipe, a series per size, a point per seed."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(RECIPES), sharex=True, sharey=True)
    for panel, recipe in zip(panels, RECIPES, strict=True):
        groups = by_setting(family for family in families if family.recipe == recipe)
        _draw_panel(panel, recipe, groups)
    panels[0].set_yticks(range(len(_MODELS)), _MODELS)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)


def _draw_panel(panel: Axes, recipe: str, groups: Sequence[Sequence[Family]]) -> None:
    for group, (colour, marker, shift) in zip(groups, _SERIES, strict=False):
        for row, model in enumerate(_MODELS):
            values = [family.loss_difference(model) for family in group]
            heights = [row + shift] * len(values)
            panel.scatter(values, heights, s=8, color=colour, alpha=0.4, linewidths=0)
            panel.scatter(
                fmean(values), row + shift, s=28, color=colour, marker=marker,
                label=None if row else size_of(group),
            )  # fmt: skip
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_title(f"{recipe} learning rates", fontsize=10)
    panel.set_xlabel("ALD, nats (lower is better)", fontsize=9)
    panel.grid(axis="x", which="both", alpha=0.2)
