"""Values in a config that never reach a tensor, or change nothing there."""

from collections.abc import Iterator
from typing import Any

from mergekit_metagpt.method.parameters import exponent_of
from mergekit_metagpt.planning.config import parts
from mergekit_metagpt.planning.levels import is_within, settings
from mergekit_metagpt.preflight.case import Case

_ALL = (None, "", "*")  # the filters that MergeKit takes for all tensors


def hidden_values(case: Case) -> Iterator[str]:
    """Find values that MergeKit never reaches: it takes the first whose filter fits."""
    for level, name, setting in settings(case.raw):
        entries = _entries(setting)
        path = f"{level.path}.parameters.{name}".lstrip(".")
        if setting == [] or any(entry.get("value") == [] for entry in entries):
            yield f"{case.file} has an empty list at {path}, which sets nothing; remove it."
        for number, entry in enumerate(entries):
            before = (n for n in range(number) if _fits(entries[n], entry.get("filter")))
            if (first := next(before, None)) is not None:
                yield (
                    f"{case.file} has a value at {path}[{number}] that is never used, since "
                    f"{path}[{first}] before it takes the same tensors; write the narrower one "
                    "first, or remove one of them."
                )


def idle_filters(case: Case) -> Iterator[str]:
    """Find filters that fit no tensor of the merge."""
    merges = [tensor.merge for tensor in case.outputs.tensors]
    for level, name, setting in settings(case.raw):
        at = level.path
        here = [p for p in parts(case.config) if is_within(p.path, at) or is_within(at, p.path)]
        near = [merge for merge in merges if any(part.holds(merge.place) for part in here)]
        names = sorted({name for merge in near for name in (merge.name, *merge.inputs.values())})
        for entry in _entries(setting):
            if names and not any(_fits(entry, name) for name in names):
                yield (
                    f"{case.file} has the filter {entry['filter']} in the parameter "
                    f"{name}{level.at}, which no tensor there has in its name; write a part of a "
                    f"name as plain text, such as {names[len(names) // 2]}."
                )


def idle_coefficients(case: Case) -> Iterator[str]:
    """Say where the parameters of coefficients change nothing."""
    given = {name for _, name, _ in settings(case.raw)} & {"granularity", "exponent"}
    merges = [tensor.merge for tensor in case.outputs.tensors if tensor.merge.granularity]
    if not given or not merges:
        return
    if all(len(merge.models) <= 2 for merge in merges):
        yield f"Of one expert, {' and '.join(sorted(given))} change nothing: its coefficient is 1."
    elif "granularity" in given and not any(
        merge.by_direction or exponent_of(merge.parameters) for merge in merges
    ):
        yield (
            "At exponent 0 norms do not count, so granularity changes nothing but where an expert "
            "equals the base."
        )


def _entries(setting: Any) -> list[dict[str, Any]]:
    """Return the values of a setting that may have filters."""
    found = setting if isinstance(setting, list) else [setting]
    return [entry for entry in found if isinstance(entry, dict)]


def _fits(entry: dict[str, Any], tensor: str | None) -> bool:
    """Whether MergeKit takes a value for a tensor; None stands for all tensors."""
    wanted = entry.get("filter")
    return wanted in _ALL or (tensor is not None and str(wanted) in str(tensor))
