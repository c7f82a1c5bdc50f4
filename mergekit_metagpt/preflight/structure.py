"""Checks of the lists of models that a config merges with each other."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods.base import BasePolicy, MergeMethod

from mergekit_metagpt.planning.config import Part, parts
from mergekit_metagpt.planning.models import ModelFiles


def bad_structure(config: MergeConfiguration, file: str, method: MergeMethod) -> Iterator[str]:
    """Find groups of models that the method cannot merge."""
    needs_base = method.spec.contract.base == BasePolicy.REQUIRED
    if needs_base and not all(part.base for part in parts(config)):
        yield (
            f"{file} has no base_model, which {method.spec.name} needs; add the model that all "
            "experts were fine-tuned from."
        )
        return
    for part in parts(config):
        twice = [str(model) for model, count in Counter(part.models).items() if count > 1]
        for model in twice:
            yield f"{file} lists model {model} twice at {part.path}; leave one of them out."
        if needs_base and not set(part.models) - {part.base}:
            yield (
                f"{file} merges no expert at {part.path}, which lists nothing but the base "
                f"{part.base}; add the models that were fine-tuned from it."
            )
        elif needs_base and part.is_slice and part.base not in part.models:
            yield (
                f"{file} does not list the base {part.base} at {part.path}; add it to the "
                "sources, with the layer_range that it contributes."
            )
        elif not twice:
            yield from _against_contract(part, file, method)


def _against_contract(part: Part, file: str, method: MergeMethod) -> Iterator[str]:
    """Ask MergeKit itself; it adds the base to ``models``, but not to slices."""
    ids = list(part.models)
    if part.base is not None and not part.is_slice and part.base not in ids:
        ids.append(part.base)
    try:
        method.spec.contract.validate_ids(ids, part.base)
    except ValueError as error:
        yield (
            f"{file} is wrong at {part.path} for {method.spec.name}: "
            f"{str(error)[:1].lower()}{str(error)[1:]}; correct the list."
        )


def bad_layers(
    config: MergeConfiguration, file: str, models: Mapping[ModelReference, ModelFiles]
) -> Iterator[str]:
    """Find ranges of layers that are empty, or that go beyond the layers of the model."""
    for part in parts(config):
        if not isinstance(part.holder, OutputSliceDefinition):
            continue
        for source in part.holder.sources:
            first, end = source.layer_range
            layers = models[source.model].layers(part.place[0])
            what = f"{file} takes the layer_range [{first}, {end}] of model {source.model}"
            if not 0 <= first < end:
                yield (
                    f"{what} at {part.path}, which holds no layer; write the first layer, from 0, "
                    "and the one after the last, such as [0, 3]."
                )
            elif layers is not None and end > layers:
                yield (
                    f"{what} at {part.path}, but the model has {layers} layers; end it at "
                    f"{layers} or before."
                )


def different_depths(
    config: MergeConfiguration, models: Mapping[ModelReference, ModelFiles]
) -> Iterator[str]:
    """Find models whose number of layers is not that of the base, or of the first."""
    for part in parts(config):
        if part.is_slice:
            continue
        merged = [*([part.base] if part.base else []), *part.models]
        counts = {model: models[model].layers(part.place[0]) for model in merged}
        known = {model: count for model, count in counts.items() if count is not None}
        first = next(iter(known), None)
        for model, count in known.items():
            if first is not None and count != known[first]:
                yield (
                    f"Model {model} has {count} layers, but {first} has {known[first]}, and "
                    "`models:` merges each layer with those of the same number; write `slices:` "
                    "instead, with the layer_range to take from each model."
                )


def same_models(base: ModelReference | None, models: Sequence[ModelFiles]) -> Iterator[str]:
    """Find models that are listed under two names."""
    seen: dict[frozenset[tuple[int, int]], ModelReference] = {}
    for files in sorted(models, key=lambda files: (files.model != base, str(files.model))):
        if not files.identity:
            continue
        first = seen.setdefault(files.identity, files.model)
        if first is not files.model:
            role = "the base" if first == base else "model"
            yield (
                f"Model {files.model} is {role} {first} under another name, with the same "
                "weight files; leave one of them out, or use one name for both."
            )


def different_architectures(
    base: ModelReference | None, models: Sequence[ModelFiles]
) -> Iterator[str]:
    """Find models that MergeKit does not merge with the base, or with the first."""
    known = [files for files in models if files.config]
    known.sort(key=lambda files: (files.model != base, str(files.model)))
    for files in known[1:]:
        first = known[0]
        if files.description and first.description:
            differ = files.description != first.description
        else:
            differ = files.architecture != first.architecture
        if differ:
            yield (
                f"Model {files.model} is a {files.architecture}, but {first.model} is a "
                f"{first.architecture}; merge fine-tunes of one base, or pass --allow-crimes."
            )
