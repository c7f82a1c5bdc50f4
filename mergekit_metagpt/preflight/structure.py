"""Which models a config merges with which."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mergekit.common import ModelReference
from mergekit.config import (
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import BasePolicy, MergeMethod


@dataclass(frozen=True)
class Group:
    """The models that one part of a config merges.

    Attributes:
        place: the part of the config.
        models: as they are listed there.
        base: the base for that part.
    """

    place: str
    models: tuple[ModelReference, ...]
    base: ModelReference | None

    @property
    def experts(self) -> set[ModelReference]:
        """The models but for the base."""
        return set(self.models) - {self.base}


def groups(config: MergeConfiguration) -> Iterator[Group]:
    """Yield what is merged with what."""
    parts: dict[str, MergeConfiguration | OutputModuleDefinition] = {"": config}
    parts |= {f"modules.{name}.": module for name, module in (config.modules or {}).items()}
    for place, part in parts.items():
        if part.models:
            yield Group(f"{place}models", tuple(m.model for m in part.models), config.base_model)
        slices: list[OutputSliceDefinition] = part.slices or []
        for number, piece in enumerate(slices):
            models = tuple(source.model for source in piece.sources)
            yield Group(f"{place}slices[{number}]", models, piece.base_model or config.base_model)


def bad_structure(config: MergeConfiguration, file: str, method: MergeMethod) -> Iterator[str]:
    """Find groups of models that the method cannot merge."""
    needs_base = method.spec.contract.base == BasePolicy.REQUIRED
    if needs_base and not all(group.base for group in groups(config)):
        yield (
            f"{file} has no base_model, which {method.spec.name} needs; add the model that all "
            "experts were fine-tuned from."
        )
        return
    for group in groups(config):
        twice = [str(model) for model, count in Counter(group.models).items() if count > 1]
        for model in twice:
            yield f"{file} lists model {model} twice at {group.place}; leave one of them out."
        if needs_base and not group.experts:
            yield (
                f"{file} merges no expert at {group.place}: besides the base {group.base} nothing "
                "is listed; add the models that were fine-tuned from it."
            )
        elif needs_base and "slices" in group.place and group.base not in group.models:
            yield (
                f"{file} does not list the base {group.base} at {group.place}; add it to the "
                "sources, with the layer_range that it takes part with."
            )
        elif not twice:
            yield from _against_contract(group, file, method)


def _against_contract(group: Group, file: str, method: MergeMethod) -> Iterator[str]:
    """Ask MergeKit itself; it adds the base to models, but not to slices."""
    ids = list(group.models)
    if group.base is not None and "slices" not in group.place and group.base not in ids:
        ids.append(group.base)
    try:
        method.spec.contract.validate_ids(ids, group.base)
    except ValueError as error:
        yield (
            f"{file} is wrong at {group.place}: {str(error)[:1].lower()}{str(error)[1:]}, says "
            f"MergeKit of {method.spec.name}; correct the list."
        )
