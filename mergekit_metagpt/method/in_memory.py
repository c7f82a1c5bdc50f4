"""Models in memory, which MergeKit's ``merge_state_dicts`` passes as a whole."""

from collections.abc import Sequence
from typing import Any

from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.core.roles import Role, role_of
from mergekit_metagpt.measure.survey import TensorInputs
from mergekit_metagpt.method.session import checkpoints_of


def are_in_memory(group: TensorGroup) -> bool:
    """Return whether a group's ids name tensors in memory, not models."""
    ids = [entry.id for entry in group.entries]
    return checkpoints_of(ids, group.base and group.base.id) is None


def without_ties(
    inputs: Sequence[TensorInputs], parameters: Sequence[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return which tensors to merge, and for each tensor which of those results is its own.

    Tensors that are tied in memory stay tied. They are merged once: as the embedding, if one of
    them is.
    """
    shapes = {tensor.name: tensor.base.shape for tensor in inputs}
    tied: list[list[int]] = []
    groups: dict[Any, list[int]] = {}
    for number, (tensor, its) in enumerate(zip(inputs, parameters, strict=True)):
        group = groups.setdefault(tensor.memory, [])
        if not group or parameters[group[0]] != its:
            group = groups[tensor.memory] = []
            tied.append(group)
        group.append(number)

    def is_table(number: int) -> bool:
        return role_of(inputs[number].name, inputs[number].base.shape, shapes.get) is Role.ROWS

    once = [next(filter(is_table, group), group[0]) for group in tied]
    places = {number: place for place, group in enumerate(tied) for number in group}
    return once, [places[number] for number in range(len(inputs))]
