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
    """Return the mean of score / reference, the paper's "Nor. Avg"; nan if a reference is 0.

    References are the scores of each task's expert.
    """
    pairs = list(zip(scores, references, strict=True))
    return fmean(score / reference if reference else math.nan for score, reference in pairs)


def average_loss_difference(losses: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of loss − reference, the paper's ALD (equation 4), in nats.

    References are the losses of each task's expert.
    """
    return fmean(loss - reference for loss, reference in zip(losses, references, strict=True))


@dataclass(frozen=True)
class Column:
    """A task, with the scores of all models."""

    task: str
    metric: str  # that it is judged by, as ``metric,filter``
    higher_is_better: bool
    scores: Mapping[str, float]  # by model, in lm-eval's unit
    losses: Mapping[str, float | None]  # by model, in nats; None if the task has no perplexity
    expert: str  # the best one, or the first of several

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

    Abs. Avg and Nor. Avg are over tasks in which a higher figure is better, ALD over those with a
    loss.
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
