"""The averages over tasks that the paper judges merges by."""

import math
from collections.abc import Sequence
from statistics import fmean


def absolute_average(scores: Sequence[float]) -> float:
    """Return the mean of a model's scores, the paper's "Abs. Avg", in the unit of the scores."""
    return fmean(scores)


def normalized_average(scores: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of score / reference, the paper's "Nor. Avg".

    Args:
        scores: a model's scores, one per task.
        references: the score of each task's expert on that task, in the same order and unit.

    Returns:
        1 for a model that equals every expert on the expert's own task; nan if an expert
        scores 0, since nothing can be divided by it.

    Raises:
        ValueError: if the numbers of scores and references differ.
    """
    pairs = list(zip(scores, references, strict=True))
    return fmean(score / reference if reference else math.nan for score, reference in pairs)


def average_loss_difference(losses: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of loss − reference, the paper's ALD (equation 4), in nats.

    MetaGPT minimises a bound on it.

    Args:
        losses: a model's losses in nats, one per task.
        references: the loss of each task's expert on that task, in the same order.

    Raises:
        ValueError: if the numbers of losses and references differ.
    """
    return fmean(loss - reference for loss, reference in zip(losses, references, strict=True))
