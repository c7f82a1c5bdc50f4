"""The results for a family: a base, an expert for each task, and their merges."""

from dataclasses import dataclass

from benchmarks.averages import absolute_average, normalized_average
from benchmarks.quality.tasks import TASKS
from mergekit_metagpt import scaling_coefficients


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

    def absolute_average(self, model: str) -> float:
        """Return the paper's Abs. Avg, in percent."""
        return absolute_average(self._accuracies(model))

    def normalized_average(self, model: str) -> float:
        """Return the paper's Nor. Avg: 1 for a model that equals each expert on its own task."""
        at_home = [self.at_home(task).accuracy for task in TASKS]
        return normalized_average(self._accuracies(model), at_home)

    def loss_difference(self, model: str) -> float:
        """Return the paper's ALD (equation 4) in nats. MetaGPT minimises a bound on it."""
        differences = [self.scores[model][task].loss - self.at_home(task).loss for task in TASKS]
        return sum(differences) / len(differences)

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
        return [self.scores[model][task].accuracy for task in TASKS]


def expert_name(task: str) -> str:
    """Return the name under which an expert is scored."""
    return f"expert {task}"
