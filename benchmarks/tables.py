"""Tables of results, as Markdown."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and sample standard deviation; for one value the mean, for none ``-``."""
    if not values:
        return "-"
    # statistics.stdev fails on nan, which Nor. Avg is if an expert scores 0.
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
