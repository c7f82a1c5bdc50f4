"""The lists of models that a config merges with each other."""

from collections import Counter
from collections.abc import Iterator

from mergekit.config import OutputSliceDefinition
from mergekit.merge_methods.base import BasePolicy, MergeMethod

from mergekit_metagpt.planning.config import Part, parts
from mergekit_metagpt.preflight.case import Case


def bad_groups(case: Case) -> Iterator[str]:
    """Find groups of models that the method cannot merge."""
    file, method = case.file, case.method
    if method is None:
        return
    needs_base = method.spec.contract.base == BasePolicy.REQUIRED
    groups = list(parts(case.config))
    if needs_base and not all(part.base for part in groups):
        yield (
            f"{file} has no base_model, which {method.spec.name} needs; add the model that all "
            "experts were fine-tuned from."
        )
        return
    for part in groups:
        twice = [model for model, count in Counter(part.models).items() if count > 1]
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
        elif not twice and (complaint := _against_contract(part, method)):
            yield (
                f"{file} is wrong at {part.path} for {method.spec.name}: "
                f"{complaint[0].lower()}{complaint[1:]}; correct the list."
            )


def _against_contract(part: Part, method: MergeMethod) -> str | None:
    """Ask MergeKit itself; it adds the base to ``models``, but not to slices."""
    ids = list(part.models)
    if part.base is not None and not part.is_slice and part.base not in ids:
        ids.append(part.base)
    try:
        method.spec.contract.validate_ids(ids, part.base)
    except ValueError as error:
        return str(error)
    return None


def bad_layers(case: Case) -> Iterator[str]:
    """Find ranges of layers that are empty, or that go beyond the layers of the model."""
    for part in parts(case.config):
        if not isinstance(part.holder, OutputSliceDefinition):
            continue
        for source in part.holder.sources:
            first, end = source.layer_range
            layers = case.models[source.model].layers(part.place[0])
            what = f"{case.file} takes the layer_range [{first}, {end}] of model {source.model}"
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
