"""The averages over tasks that the paper judges merges by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mergekit_metagpt.evaluation.results import Results


def absolute_average(scores: Sequence[float]) -> float:
    """Return the mean of a model's scores, the paper's "Abs. Avg", in the unit of the scores."""
    return fmean(scores)


def normalized_average(scores: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of score / reference, the paper's "Nor. Avg".

    Args:
        scores: a model's scores, one per task.
        references: the score of each task's expert on that task, in the same order and unit. If
            one is 0, the average is nan.
    """
    pairs = list(zip(scores, references, strict=True))
    return fmean(score / reference if reference else math.nan for score, reference in pairs)


def average_loss_difference(losses: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of loss − reference, the paper's ALD (equation 4), in nats.

    MetaGPT minimises a bound on it. References are the losses of each task's expert.
    """
    return fmean(loss - reference for loss, reference in zip(losses, references, strict=True))


@dataclass(frozen=True)
class Column:
    """A task, with the scores of all models.

    Attributes:
        task: its name.
        metric: the figure that it is judged by, as ``metric,filter``.
        higher_is_better: whether a higher figure is better.
        scores: that figure by model, in lm-eval's unit.
        losses: the logarithm of the perplexity by model, in nats; None if the task has none.
        expert: the expert of the task: the one with the best figure, or the first of several.
    """

    task: str
    metric: str
    higher_is_better: bool
    scores: Mapping[str, float]
    losses: Mapping[str, float | None]
    expert: str

    @classmethod
    def of(cls, task: str, results: Mapping[str, Results], experts: Sequence[str]) -> "Column":
        """Read a task's scores from the results of each model."""
        metric, higher = results[experts[0]].metric(task)
        scores = {model: own.metrics(task)[metric] for model, own in results.items()}
        losses = {model: own.loss(task) for model, own in results.items()}
        sign = 1 if higher else -1
        best = max(experts, key=lambda it: (sign * scores[it], -(losses[it] or 0)))
        return cls(task, metric, higher, scores, losses, best)


def averages(columns: Sequence[Column], model: str) -> dict[str, float | None]:
    """Return a model's averages over the tasks that have them; None if there are none.

    Abs. Avg and Nor. Avg are over the tasks in which a higher figure is better, ALD over those
    with a loss.
    """
    higher = [column for column in columns if column.higher_is_better]
    scores = [column.scores[model] for column in higher]
    best = [column.scores[column.expert] for column in higher]
    pairs = [(column.losses[model], column.losses[column.expert]) for column in columns]
    losses = [(loss, least) for loss, least in pairs if loss is not None and least is not None]
    figures = {
        "absolute_average": absolute_average(scores) if scores else math.nan,
        "normalized_average": normalized_average(scores, best) if scores else math.nan,
        "average_loss_difference": (
            average_loss_difference(*zip(*losses, strict=True)) if losses else math.nan
        ),
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
