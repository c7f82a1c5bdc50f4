"""The results for a family: a base, an expert for each task, and their merges."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from mergekit_metagpt import scaling_coefficients
from mergekit_metagpt.evaluation.scores import average_loss_difference, normalized_average


@dataclass(frozen=True)
class Score:
    """How well a model does on a task.

    Attributes:
        accuracy: the share of correct answers, in percent.
        loss: the negative log-likelihood of the answer, in nats, as a mean over examples.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Family:
    """The results for one family.

    Attributes:
        size: the name of the models' size.
        recipe: the name of the recipe that trained the experts.
        seed: the seed of weights, examples and DARE.
        parameters: the number of parameters of a model.
        norms: ‖τ_t‖ over the whole model, by task.
        grid: the mean validation loss of task arithmetic, by its scaling coefficient.
        scores: the scores on the test examples, by model, then by task.
    """

    size: str
    recipe: str
    seed: int
    parameters: int
    norms: dict[str, float]
    grid: dict[float, float]
    scores: dict[str, dict[str, Score]]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order of the tables."""
        return list(self.norms)

    def absolute_average(self, model: str) -> float:
        """Return the paper's Abs. Avg, in percent."""
        return fmean(self._accuracies(model))

    def normalized_average(self, model: str) -> float:
        """Return the paper's Nor. Avg: 1 for a model that equals each expert on its own task."""
        at_home = [self.at_home(task).accuracy for task in self.tasks]
        return normalized_average(self._accuracies(model), at_home)

    def loss_difference(self, model: str) -> float:
        """Return the paper's ALD in nats."""
        losses = [self.scores[model][task].loss for task in self.tasks]
        return average_loss_difference(losses, [self.at_home(task).loss for task in self.tasks])

    def gain(self, task: str) -> float:
        """Return how much lower an expert's loss on its own task is than the base's, in nats."""
        return self.scores["base"][task].loss - self.at_home(task).loss

    def at_home(self, task: str) -> Score:
        """Return an expert's score on its own task."""
        return self.scores[expert_name(task)][task]

    def coefficients(self) -> dict[str, float]:
        """Return MetaGPT's λ_t at granularity ``model``, by task."""
        squares = [norm**2 for norm in self.norms.values()]
        return dict(zip(self.norms, scaling_coefficients(squares), strict=True))

    def _accuracies(self, model: str) -> list[float]:
        return [self.scores[model][task].accuracy for task in self.tasks]


def expert_name(task: str) -> str:
    """Return the name under which an expert is scored."""
    return f"expert {task}"


class Average(NamedTuple):
    """One of the averages in the last columns of a table.

    Attributes:
        name: the name of the column.
        of: computes the average of a model of a family.
        digits: the number of digits after the decimal point.
        wins: describes the better of two models.
        sign: 1 if higher is better, -1 if lower is better.
    """

    name: str
    of: Callable[[Any, str], float]
    digits: int
    wins: str
    sign: int

    def is_better(self, family: Family, one: str, other: str) -> bool:
        """Return whether one model of a family is strictly better than another."""
        return self.sign * (self.of(family, one) - self.of(family, other)) > 0


AVERAGES = (
    Average("Abs. Avg", Family.absolute_average, 1, "higher Abs. Avg", 1),
    Average("Nor. Avg", Family.normalized_average, 3, "higher Nor. Avg", 1),
    Average("ALD", Family.loss_difference, 3, "lower ALD", -1),
)
