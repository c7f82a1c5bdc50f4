"""Warnings while MergeKit's own commands merge, when no forecast has been shown."""

from collections import Counter
from collections.abc import Hashable, Iterator

from mergekit_metagpt.method.advice import (
    DOMINANT,
    HARDLY,
    STRETCHED,
    dominant,
    experts_in,
    exponent_of,
    largest_mean,
    milder,
)
from mergekit_metagpt.method.summary import Entry, Summary

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
                yield f"In tensors with at least a tenth of the parameters, {sentence}"


def _shown(entry: Entry) -> Iterator[tuple[str, Hashable]]:
    """Yield what a tensor shows as the end of a sentence, and the expert that it is about."""
    expert = dominant(entry)
    if expert is not None:
        its = milder(Summary([entry]), largest_mean)
        way = f"set exponent: {exponent_of(its):g}, or " if its else ""
        yield (
            f"{expert} has more than {DOMINANT:.0%} of the merge, so almost nothing of the "
            f"others is left; {way}give it a smaller weight (its prior).",
            expert,
        )
    if not entry.directions or not entry.directions.scale:
        return
    scale, taking_part = entry.directions.scale, experts_in(entry)
    for expert, kept in zip(entry.experts, entry.directions.kept, strict=True):
        if expert in taking_part and kept / scale < HARDLY:
            yield (
                f"the merge keeps less than {HARDLY:.0%} of the task vector of {expert}; give it "
                "a larger weight (its prior).",
                expert,
            )
    if entry.directions.squared_norm > (STRETCHED * scale) ** 2 * sum(entry.squared_norms):
        yield (
            f"the merge moves more than {STRETCHED} times as far as orthogonal experts would "
            "together, and may be broken; set a smaller lambda, or granularity: model.",
            None,
        )
