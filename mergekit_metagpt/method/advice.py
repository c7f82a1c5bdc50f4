"""Warnings about the coefficients of a merge, each with a way out."""

from collections.abc import Callable, Hashable, Iterator, Sequence

from mergekit_metagpt.core.coefficients import scaling_coefficients
from mergekit_metagpt.method.summary import Entry, Summary

# If one expert has more than this share, almost nothing of the others is left.
DOMINANT = 0.9
# A merge that moves so many times as far as a sum of experts at right angles adds up too much.
_STRETCHED = 1.5
# Experts that moved farther than this, relative to the base's length, were not seen to add up: a
# language model's moved by 0.1 to 1 % and did; small models' moved by 5 to 10 % and did not.
_FAR = 0.05
# An expert of whose task vector less than this is in the merge is hardly there.
_HARDLY = 0.1


def warnings(summary: Summary) -> list[str]:
    """Return a sentence for each warning; its figures follow from the norms, no model is read."""
    found = [sentence for _, sentence in concerns(summary)]
    if not (found or summary.by_direction):
        found = list(_dominated_tensors(summary))
    unmoved = [expert.model for expert in summary.experts if expert.squared_norm == 0]
    return found + [f"{it} is equal to the base, and gets no share of the merge." for it in unmoved]


def concerns(summary: Summary) -> Iterator[tuple[Hashable, str]]:
    """Yield an expert that has too much or too little, or None for all, and a sentence about it."""
    if summary.by_direction:
        yield from _hardly_kept(summary)
        yield from _stretched(summary)
    else:
        yield from _dominant_experts(summary)


def share(coefficient: float) -> str:
    """Write a coefficient for people.

    >>> share(0.25), share(0.0), share(0.00001234)
    ('0.2500', '0.0000', '1.2e-05')
    """
    return f"{coefficient:.1e}" if 0 < coefficient < 1e-3 else f"{coefficient:.4f}"


def _dominant_experts(summary: Summary) -> Iterator[tuple[Hashable, str]]:
    if len(_taking_part(*summary.entries)) < 2:
        return
    for expert in summary.experts:
        if expert.mean > DOMINANT:
            way = ""
            if its := _milder(summary, lambda its: max(other.mean for other in its.experts)):
                means = _shares([other.mean for other in its.experts])
                way = f"set exponent: {_exponent_of(its):g}, which gives {means}, or "
            yield (
                expert.model,
                f"{expert.model} has {expert.mean:.1%} of the merge, so the others hardly "
                f"count; {way}give it a smaller weight (its prior).",
            )


def _dominated_tensors(summary: Summary) -> Iterator[str]:
    """Warn if different experts dominate different tensors, so that no mean is large."""
    part = dominated_part(summary)
    if part <= 0.5:
        return
    ways = []
    shared = _over_the_model(summary)
    if shared and max(shared) <= DOMINANT:
        ways.append(f"set granularity: model, which gives {_shares(shared)}")
    if its := _milder(summary, dominated_part):
        ways.append(f"set exponent: {_exponent_of(its):g}, which leaves {dominated_part(its):.0%}")
    yield (
        f"In tensors with {part:.0%} of the parameters, one expert has "
        f"more than {DOMINANT:.0%}, so almost nothing of the others is left; "
        f"{', or '.join(ways) or 'give the experts different weights (their priors)'}."
    )


def _hardly_kept(summary: Summary) -> Iterator[tuple[Hashable, str]]:
    """Warn if hardly anything of a task vector is in the merge, whatever its coefficients are."""
    wanted, scale = _taking_part(*summary.entries), _scale(summary)
    way = "set exponent: 0, or " if _exponent_of(summary) else ""
    for expert in summary.experts if scale else ():
        if expert.kept is not None and expert.model in wanted and expert.kept / scale < _HARDLY:
            yield (
                expert.model,
                f"The merge keeps only {expert.kept:.1%} of the task vector of {expert.model}; "
                f"{way}give it a larger weight (its prior).",
            )


def _stretched(summary: Summary) -> Iterator[tuple[Hashable, str]]:
    """Warn if the merge moves farther than its experts do, and than lambda asks for."""
    most = max(1.0, abs(_scale(summary)))
    if summary.stretch is not None and summary.stretch > _STRETCHED * most:
        yield (
            None,
            f"The merge moves {summary.stretch:.1f} times as far as orthogonal experts would "
            f"together, and may be broken; set lambda: {_scale(summary) / summary.stretch:.2g}, or "
            "granularity: model.",
        )


def _scale(summary: Summary) -> float:
    """Return MergeKit's lambda of a merge by directions."""
    return next(entry.directions.scale for entry in summary.entries if entry.directions)


def _taking_part(*entries: Entry) -> set[Hashable]:
    """Return the experts that move in any of the tensors and have a prior there."""
    return {
        expert
        for entry in entries
        for expert, *figures in zip(entry.experts, entry.squared_norms, entry.priors, strict=True)
        if all(figures)
    }


def moved_far(experts: Sequence[object], moved: Sequence[float] | None) -> list[str]:
    """Warn if an expert moved too far for adding up; ``moved`` are ‖τ_t‖ / ‖θ_0‖, if known."""
    part, expert = max(zip(moved or [0.0], experts, strict=False), key=lambda pair: pair[0])
    if part <= _FAR:
        return []
    return [
        f"{expert} moved by {part:.1%} of the base's length. Adding experts up was measured to "
        "work where they moved by up to 1 %, and to fail where they moved by more than 5 %; "
        "compare the merge with granularity: model before you rely on it."
    ]


def dominated_part(summary: Summary) -> float:
    """Return the part of the parameters in tensors that one of several experts dominates."""
    shared = [it for it in summary.entries if not it.directions and len(_taking_part(it)) > 1]
    sizes = [entry.size for entry in shared if max(entry.coefficients) > DOMINANT]
    return sum(sizes) / summary.parameters if sizes else 0.0


def _milder(summary: Summary, dominance: Callable[[Summary], float]) -> Summary | None:
    """Return the merge with the next smaller exponent, 1 or 0, that makes a dominance less."""
    for exponent in (1, 0):
        its = Summary(entry.changed(exponent, {}) for entry in summary.entries)
        if exponent < _exponent_of(summary) and round(dominance(its) - dominance(summary), 2) < 0:
            return its
    return None


def _exponent_of(summary: Summary) -> float:
    """Return the largest exponent of any tensor."""
    return max(entry.exponent for entry in summary.entries)


def _over_the_model(summary: Summary) -> list[float] | None:
    """Return the coefficients at granularity ``model``, if it is another one and defined."""
    kinds = {(entry.experts, entry.priors) for entry in summary.entries}
    if "model" in summary.granularities or len(kinds) > 1:
        return None
    ((_, priors),) = kinds
    norms = [expert.squared_norm for expert in summary.experts]
    return scaling_coefficients(norms, priors, _exponent_of(summary))


def _shares(coefficients: Sequence[float]) -> str:
    return " / ".join(map(share, coefficients))
