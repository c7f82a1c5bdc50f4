"""The two averages that the paper's tables end in."""

import math
from collections.abc import Sequence
from statistics import fmean


def absolute_average(scores: Sequence[float]) -> float:
    """Return the mean of a model's scores, the paper's "Abs. Avg", in their unit."""
    return fmean(scores)


def normalized_average(scores: Sequence[float], references: Sequence[float]) -> float:
    """Return the mean of score / reference, the paper's "Nor. Avg".

    Args:
        scores: a model's scores, one per task.
        references: what the expert of each task scores on it, in the same order and unit.

    Returns:
        1 for a model that is as good as every expert at home; nan where an expert scores 0,
        to which nothing can be related.

    Raises:
        ValueError: if there are not as many references as scores.
    """
    pairs = list(zip(scores, references, strict=True))
    return fmean(score / reference if reference else math.nan for score, reference in pairs)
