"""What the scores of a base, experts and a merge say: the paper's averages over tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mergekit_metagpt.evaluation.averages import (
    absolute_average,
    average_loss_difference,
    normalized_average,
)
from mergekit_metagpt.evaluation.results import Results


@dataclass(frozen=True)
class Score:
    """How well a model does on a task.

    Attributes:
        value: the figure that the task is judged by, in lm-eval's unit.
        loss: the logarithm of its perplexity, in nats; None if the task measures none.
    """

    value: float
    loss: float | None


@dataclass(frozen=True)
class Column:
    """A task, with the scores of all models.

    Attributes:
        task: its name.
        metric: the figure that it is judged by, as ``metric,filter``.
        higher_is_better: whether a higher figure is better.
        scores: by model.
        expert: the expert of the task: the one with the best figure, or the first of several.
    """

    task: str
    metric: str
    higher_is_better: bool
    scores: Mapping[str, Score]
    expert: str

    @classmethod
    def of(cls, task: str, results: Mapping[str, Results], experts: Sequence[str]) -> "Column":
        """Read a task's scores from the results of each model."""
        metric, higher = results[experts[0]].metric(task)
        scores = {
            model: Score(found.metrics(task)[metric], found.loss(task))
            for model, found in results.items()
        }

        def rank(expert: str) -> tuple[float, float]:
            score = scores[expert]
            return (score.value if higher else -score.value, -(score.loss or 0))

        return cls(task, metric, higher, scores, max(experts, key=rank))

    @property
    def best(self) -> Score:
        """The score of the task's expert."""
        return self.scores[self.expert]


@dataclass(frozen=True)
class Scoreboard:
    """The scores of models on tasks."""

    columns: Sequence[Column]

    def absolute_average(self, model: str) -> float:
        """Return the paper's Abs. Avg; nan if in no task a higher figure is better."""
        scores = [column.scores[model].value for column in self._higher]
        return absolute_average(scores) if scores else math.nan

    def normalized_average(self, model: str) -> float:
        """Return the paper's Nor. Avg; nan if in no task a higher figure is better."""
        scores = [column.scores[model].value for column in self._higher]
        best = [column.best.value for column in self._higher]
        return normalized_average(scores, best) if scores else math.nan

    def loss_difference(self, model: str) -> float:
        """Return the paper's ALD in nats; nan if no task measures a loss."""
        losses = [(column.scores[model].loss, column.best.loss) for column in self.columns]
        known = [(loss, best) for loss, best in losses if loss is not None and best is not None]
        return average_loss_difference(*zip(*known, strict=True)) if known else math.nan

    @cached_property
    def _higher(self) -> list[Column]:
        return [column for column in self.columns if column.higher_is_better]
