"""The averages over tasks that the paper judges merges by."""

import math
from collections.abc import Sequence
from statistics import fmean


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
