"""What is measured on a family: a base, an expert for each task, and their merges."""

from dataclasses import dataclass

from benchmarks.averages import absolute_average, normalized_average
from benchmarks.quality.tasks import TASKS
from mergekit_metagpt import scaling_coefficients


@dataclass(frozen=True)
class Score:
    """How well a model does on a task.

    Attributes:
        accuracy: right answers, in percent.
        loss: mean over examples of the answer's negative log-likelihood, in nats.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Family:
    """A family's figures.

    Attributes:
        size: of the models, by name.
        recipe: by which the experts were trained, by name.
        seed: of weights, examples and DARE.
        parameters: of a model.
        norms: ‖τ_t‖ over the whole model, by task.
        grid: mean validation loss of task arithmetic, by its scaling coefficient.
        scores: on the test examples, by model, then by task.
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
        """Return the paper's Nor. Avg: 1 where a model is as good as all experts at home."""
        at_home = [self.at_home(task).accuracy for task in TASKS]
        return normalized_average(self._accuracies(model), at_home)

    def loss_difference(self, model: str) -> float:
        """Return the paper's ALD, equation 4, in nats: what MetaGPT bounds and minimises."""
        differences = [self.scores[model][task].loss - self.at_home(task).loss for task in TASKS]
        return sum(differences) / len(differences)

    def gain(self, task: str) -> float:
        """Return by how much an expert lowered its own task's loss, in nats."""
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
