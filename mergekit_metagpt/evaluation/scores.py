"""What lm-eval says of models, and the averages over tasks that the paper judges merges by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mergekit_metagpt.wording import BadInputError

# Their logarithms are losses, in nats per example, word or byte.
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class Score:
    """How a model did on a task."""

    metric: str  # as ``metric,filter``: the first for which higher is better, or else the first
    higher_is_better: bool
    value: float  # in lm-eval's unit
    loss: float | None  # in nats; None if the task has no perplexity
    file: Path  # a ``results_*.json`` of lm-eval

    @classmethod
    def of(cls, task: str, report: Mapping[str, Any], file: Path) -> "Score":
        """Read the score on a task or group from the content of a file."""
        figures = figures_of(report["results"][task])
        if not figures:
            raise BadInputError(f"lm-eval gives no figure for {task}; name its subtasks.")
        known = report["higher_is_better"].get(task, {})  # null where members of a group disagree
        higher = [key for key in figures if known.get(key.split(",")[0])]
        metric, by_name = (*higher, *figures)[0], {k.split(",")[0]: v for k, v in figures.items()}
        losses = [math.log(by_name[name]) for name in _PERPLEXITIES if name in by_name]
        return cls(metric, bool(higher), figures[metric], losses[0] if losses else None, file)

    @property
    def rank(self) -> tuple[float, float]:
        """Is larger for a better model; of equal scores, the one with less loss is better."""
        return self.value if self.higher_is_better else -self.value, -(self.loss or 0.0)


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a task by ``metric,filter``, without standard errors."""
    return {
        key: float(value)
        for key, value in result.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


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


def averages(pairs: Sequence[tuple[Score, Score]]) -> dict[str, float | None]:
    """Return a model's averages over the tasks that have them; None if there are none.

    Each pair is its score on a task, and that of the best expert. Abs. Avg, the mean score, and
    Nor. Avg are over tasks in which a higher figure is better, ALD over those with a loss.
    """
    unknown = [(math.nan, math.nan)]
    higher = [(own.value, best.value) for own, best in pairs if own.higher_is_better] or unknown
    both = [(own.loss, best.loss) for own, best in pairs]
    losses = [(own, best) for own, best in both if own is not None and best is not None] or unknown
    scores, references = zip(*higher, strict=True)
    figures = {
        "absolute_average": fmean(scores),
        "normalized_average": normalized_average(scores, references),
        "average_loss_difference": average_loss_difference(*zip(*losses, strict=True)),
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
