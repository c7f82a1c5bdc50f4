"""Tables of the results, as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean

from benchmarks.quality.families import AVERAGES, Average, Family, expert_name
from benchmarks.quality.measure import BEST_OF_GRID, RECIPES
from benchmarks.quality.merges import BASELINES, METAGPT, PLAIN
from benchmarks.quality.tasks import TASKS
from benchmarks.tables import spread, table

RIVALS = (*BASELINES, BEST_OF_GRID)
_EXPERTS = ("base", *map(expert_name, TASKS))
_MERGES = (*RIVALS, *METAGPT)

# Pairs of our method and the method to compare it with; ours gets a granularity added.
_DUELS = [("MetaGPT", rival) for rival in RIVALS] + [
    (f"{rival} + MetaGPT", rival) for rival in ("TIES", "DARE")
]


def report(families: Sequence[Family]) -> str:
    """Return a table for each size and recipe, and tables of MetaGPT's wins over all sizes."""
    parts = []
    for group in by_setting(families):
        parts += [_heading(group), _how_far(group), _scores(group)]
    parts += ["### In how many families MetaGPT wins"]
    parts += [_duels(families, average) for average in AVERAGES]
    return "\n\n".join(parts)


def by_setting(families: Iterable[Family]) -> list[list[Family]]:
    """Group families that differ only in the seed."""
    groups: dict[tuple[str, str], list[Family]] = {}
    for family in families:
        groups.setdefault((family.size, family.recipe), []).append(family)
    return list(groups.values())


def size_of(group: Sequence[Family]) -> str:
    """Return the size of a group's models, in words."""
    return f"{group[0].parameters / 1e6:.2g} M parameters"


def _heading(group: Sequence[Family]) -> str:
    seeds = f"{len(group)} seed{'s' * (len(group) > 1)}"
    return f"### {size_of(group)}, {group[0].recipe} learning rates, {seeds}"


def _how_far(group: Sequence[Family]) -> str:
    """Return a table of how far each expert moved, and how much it learned."""
    figures: dict[str, Callable[[Family, str], float]] = {
        "‖τ‖": lambda family, task: family.norms[task],
        "λ of MetaGPT, model": lambda family, task: family.coefficients()[task],
        "loss of the base − loss of the expert": Family.gain,
    }
    rows = (
        [name, *(spread([figure(family, task) for family in group], 2) for task in TASKS)]
        for name, figure in figures.items()
    )
    return table(["expert", *TASKS], rows)


def _scores(group: Sequence[Family]) -> str:
    """Return a table like the paper's, with scores in percent and the best merges in bold."""
    best = {
        average.name: max(
            _MERGES,
            key=lambda model: average.sign * fmean(average.of(family, model) for family in group),
        )
        for average in AVERAGES
    }

    def cells(model: str) -> Iterable[str]:
        yield model
        for task in TASKS:
            yield spread([family.scores[model][task].accuracy for family in group], 1)
        for average in AVERAGES:
            cell = spread([average.of(family, model) for family in group], average.digits)
            yield f"**{cell}**" if best[average.name] == model else cell

    header = ["model", *TASKS, *(average.name for average in AVERAGES)]
    return table(header, (cells(model) for model in (*_EXPERTS, *_MERGES)))


def _duels(families: Sequence[Family], average: Average) -> str:
    """Return in how many families our method beats a rival, by recipe and granularity."""

    def won(ours: str, rival: str, recipe: str, granularity: str) -> str:
        row = f"{ours}, {granularity}"
        if row not in METAGPT:
            return ""
        met = [family for family in families if family.recipe == recipe]
        victories = (average.is_better(family, row, rival) for family in met)
        return f"{sum(victories)} of {len(met)}"

    columns = list(product(RECIPES, PLAIN))
    rows = (
        [f"{ours} against {rival}", *(won(ours, rival, *column) for column in columns)]
        for ours, rival in _DUELS
    )
    return table([average.wins, *(", ".join(column) for column in columns)], rows)
