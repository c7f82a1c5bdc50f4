"""Warnings while MergeKit's own commands merge, when no forecast has been shown."""

from collections import Counter
from collections.abc import Hashable, Iterator

from mergekit_metagpt.method.advice import DOMINANT, HARDLY, STRETCHED, milder
from mergekit_metagpt.method.summary import Entry

# What shows in tensors with this part of the parameters is worth a warning.
_PART = 0.1


class Watch:
    """Looks at the tensors of one merge as they are merged, and warns once of each thing.

    Args:
        parameters: how many numbers will be merged.
    """

    def __init__(self, parameters: int) -> None:
        self._enough = _PART * parameters
        self._seen: Counter[tuple[str, Hashable]] = Counter()

    def add(self, entry: Entry) -> Iterator[str]:
        """Yield a sentence for each thing that enough tensors have now shown."""
        for sentence, of in _shown(entry):
            before = self._seen[sentence, of]
            self._seen[sentence, of] += entry.size
            if before < self._enough <= self._seen[sentence, of]:
                yield f"In tensors with a tenth of the parameters, {sentence}"


def _shown(entry: Entry) -> Iterator[tuple[str, Hashable]]:
    """Yield what a tensor shows as the end of a sentence, and the expert that it is about."""
    several = len(entry.experts) > 1
    figures = zip(entry.experts, entry.squared_norms, entry.coefficients, strict=True)
    for expert, norm, coefficient in figures:
        if entry.directions and norm and coefficient < HARDLY:
            yield (
                f"the merge keeps less than {HARDLY:.0%} of the task vector of {expert}; give it "
                "a larger weight (its prior).",
                expert,
            )
        elif not entry.directions and several and coefficient > DOMINANT:
            way = "" if entry.exponent == 0 else f"set exponent: {milder(entry.exponent)}, or "
            yield (
                f"{expert} has more than {DOMINANT:.0%} of the merge, so almost nothing of the "
                f"others is left; {way}give it a smaller weight (its prior).",
                expert,
            )
    if entry.directions:
        length, most = entry.directions.squared_norm, STRETCHED**2 * sum(entry.squared_norms)
        if length > most:
            yield (
                f"the merge moves more than {STRETCHED} times as far as unrelated experts would "
                "together, and may be broken; set a smaller lambda, or granularity: model.",
                None,
            )
