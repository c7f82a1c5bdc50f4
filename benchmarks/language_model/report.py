"""Tables of the results, as Markdown; every sentence is written from the figures."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from benchmarks.language_model.measure import LanguageFamily
from benchmarks.quality.families import AVERAGES, Average, expert_name
from benchmarks.tables import spread, table

_ALD = next(average for average in AVERAGES if average.name == "ALD")
_PERPLEXITY = Average("perplexity", LanguageFamily.word_perplexity, 1, "lower perplexity", -1)
_COLUMNS = (*AVERAGES, _PERPLEXITY)


def report(families: Sequence[LanguageFamily], ours: Iterable[str]) -> str:
    """Return what wins, a table of all families, and tables for each recipe.

    Args:
        families: the results. A merge is missing where MergeKit refuses it.
        ours: the names of the rows of MetaGPT, to compare with each of the others.
    """
    ours = list(ours)
    parts = ["### In short", _winners(families), _summary(families)]
    parts += ["### Against each other method", _duels(families, ours)]
    for group in _by_recipe(families):
        parts += [_heading(group), _how_far(group), _scores(group)]
    return "\n\n".join(parts)


def _merges(families: Sequence[LanguageFamily]) -> list[str]:
    """Return the merges that all families have."""
    alone = {"base", *map(expert_name, families[0].tasks)}
    everywhere = set.intersection(*(set(family.scores) for family in families)) - alone
    return [model for model in families[0].scores if model in everywhere]


def _all_merges(families: Sequence[LanguageFamily]) -> list[str]:
    """Return the merges that any family has."""
    return list(dict.fromkeys(model for family in families for model in _merges([family])))


def _having(families: Iterable[LanguageFamily], *models: str) -> list[LanguageFamily]:
    """Return the families that have scores of all these models."""
    return [family for family in families if set(models) <= family.scores.keys()]


def _by_recipe(families: Iterable[LanguageFamily]) -> list[list[LanguageFamily]]:
    """Group families that differ only in the seed."""
    groups: dict[str, list[LanguageFamily]] = {}
    for family in families:
        groups.setdefault(family.recipe, []).append(family)
    return list(groups.values())


def _heading(group: Sequence[LanguageFamily]) -> str:
    seeds = f"{len(group)} seed{'s' * (len(group) > 1)}"
    return f"### {group[0].size}, {group[0].recipe}, {seeds}"


def _winners(families: Sequence[LanguageFamily]) -> str:
    """Say for each measure which merge is best, by how much over the next one, and how often."""
    return "\n".join(_winner(families, average) for average in _COLUMNS)


def _winner(families: Sequence[LanguageFamily], average: Average) -> str:
    merges = _merges(families)
    means = {model: _mean(families, model, average) for model in merges}
    first, second = sorted(merges, key=lambda model: -average.sign * means[model])[:2]
    gaps = [average.sign * (average.of(it, first) - average.of(it, second)) for it in families]
    wins = sum(not any(average.is_better(it, other, first) for other in merges) for it in families)
    digits = average.digits
    return (
        f"- **{average.name}:** {first} is best on average: {means[first]:.{digits}f}, against "
        f"{means[second]:.{digits}f} of {second}, which it beats by {spread(gaps, digits)}. "
        f"It is the best merge in {wins} of {len(families)} families."
    )


def _summary(families: Sequence[LanguageFamily]) -> str:
    """Return the ALD of each merge by recipe, and in how many families it is the lowest."""
    groups = _by_recipe(families)
    best = [min(_merges(group), key=lambda model: _mean(group, model, _ALD)) for group in groups]

    def cells(model: str) -> Iterable[str]:
        yield model
        for group, lowest in zip(groups, best, strict=True):
            cell = spread([_ALD.of(it, model) for it in _having(group, model)], _ALD.digits)
            yield f"**{cell}**" if model == lowest else cell
        yield str(sum(model == min(_merges([it]), key=it.loss_difference) for it in families))

    header = ["ALD", *(group[0].recipe for group in groups), f"lowest, of {len(families)}"]
    return table(header, (cells(model) for model in _all_merges(families)))


def _duels(families: Sequence[LanguageFamily], ours: Sequence[str]) -> str:
    """Return in how many families each of our rows has a lower ALD, and by how much on average."""

    def cell(our: str, rival: str) -> str:
        both = _having(families, our, rival)
        gaps = [_ALD.of(family, our) - _ALD.of(family, rival) for family in both]
        return f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}, {fmean(gaps):+.3f}" if gaps else "-"

    rivals = [model for model in _all_merges(families) if model not in ours]
    rows = ([rival, *(cell(our, rival) for our in ours)] for rival in rivals)
    return table(["lower ALD, and its difference", *ours], rows)


def _how_far(group: Sequence[LanguageFamily]) -> str:
    """Return a table of how far each expert moved, and what it learned and forgot."""

    def at_home(family: LanguageFamily, task: str) -> float:
        return family.at_home(task).accuracy

    figures: dict[str, tuple[Callable[[LanguageFamily, str], float], int]] = {
        "‖τ‖": (lambda family, task: family.norms[task], 2),
        "λ of MetaGPT, model": (lambda family, task: family.coefficients()[task], 2),
        "right answers of the base, %": (lambda it, task: it.scores["base"][task].accuracy, 1),
        "of the expert, %": (at_home, 1),
        "loss of the base − loss of the expert": (lambda family, task: family.gain(task), 2),
        "perplexity of the expert": (lambda it, task: it.perplexity[expert_name(task)], 1),
    }
    tasks = group[0].tasks
    rows = (
        [name, *(spread([figure(family, task) for family in group], digits) for task in tasks)]
        for name, (figure, digits) in figures.items()
    )
    return table(["expert", *tasks], rows)


def _scores(group: Sequence[LanguageFamily]) -> str:
    """Return a table like the paper's, with the best merges in bold."""
    best = {
        average.name: max(
            _merges(group), key=lambda model: average.sign * _mean(group, model, average)
        )
        for average in _COLUMNS
    }

    def cells(model: str) -> Iterable[str]:
        yield model
        having = _having(group, model)
        for task in group[0].tasks:
            yield spread([family.scores[model][task].accuracy for family in having], 1)
        for average in _COLUMNS:
            cell = spread([average.of(family, model) for family in having], average.digits)
            yield f"**{cell}**" if best[average.name] == model else cell

    header = ["model", *group[0].tasks, *(average.name for average in _COLUMNS)]
    return table(header, (cells(model) for model in ("base", *_all_merges(group))))


def _mean(families: Iterable[LanguageFamily], model: str, average: Average) -> float:
    return fmean(average.of(family, model) for family in families)
