"""The results files of lm-eval, ``results_*.json``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mergekit_metagpt.wording import BadInputError, reason

# By task, then by `metric,filter`, such as "acc,none".
Metrics = dict[str, dict[str, float]]

# Their logarithms are losses, in nats per example, word or byte.
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


class Results(BaseModel):
    """The scores of one model, as far as they are read here."""

    results: dict[str, dict[str, Any]]  # figures, among other things, by task or group
    # By task and metric; None where members of a group disagree.
    higher_is_better: dict[str, dict[str, bool | None]] = {}
    config: dict[str, Any] = {}  # the model, and the settings of the run

    @classmethod
    def read(cls, file: Path) -> "Results":
        """Return what a file holds."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise BadInputError(
                f"{file} is no results file of lm-eval ({reason(error)}); name a results_*.json."
            ) from None

    def metrics(self, task: str) -> dict[str, float]:
        """Return the figures of a task by ``metric,filter``, without standard errors."""
        return {
            key: float(value)
            for key, value in self.results[task].items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }

    def metric(self, task: str) -> tuple[str, bool]:
        """Return the metric that a task is judged by, and whether higher is better.

        It is the first for which higher is better, or else the first.
        """
        keys = list(self.metrics(task))
        if not keys:
            raise BadInputError(f"lm-eval gives no figure for {task}; name its subtasks.")
        known = self.higher_is_better.get(task, {})
        higher = [key for key in keys if known.get(key.partition(",")[0])]
        return (*higher, *keys)[0], bool(higher)

    def loss(self, task: str) -> float | None:
        """Return the logarithm of a task's perplexity in nats, if it has one."""
        by_name = {key.partition(",")[0]: value for key, value in self.metrics(task).items()}
        perplexities = [by_name[name] for name in _PERPLEXITIES if name in by_name]
        return math.log(perplexities[0]) if perplexities else None


def metrics(report: Mapping[str, Any]) -> Metrics:
    """Return the figures of all tasks in a report of lm-eval."""
    results = Results.model_validate(report)
    return {task: results.metrics(task) for task in results.results}
