"""The lists of models that a config merges with each other."""

from collections.abc import Iterator

from mergekit.config import OutputSliceDefinition
from mergekit.merge_methods.base import BasePolicy

from mergekit_metagpt.planning.config import parts
from mergekit_metagpt.preflight.case import Case


def no_experts(case: Case) -> Iterator[str]:
    """Find lists of nothing but the base, which MergeKit would write as it is."""
    if case.method is None or case.method.spec.contract.base != BasePolicy.REQUIRED:
        return
    for part in parts(case.config):
        if part.base and not set(part.models) - {part.base}:
            yield (
                f"{case.file} merges no expert at {part.path}, which lists nothing but the base "
                f"{part.base}; add the models that were fine-tuned from it."
            )


def no_layers(case: Case) -> Iterator[str]:
    """Find ranges of layers that are empty: MergeKit would write a model without these layers."""
    for part in parts(case.config):
        for source in part.holder.sources if isinstance(part.holder, OutputSliceDefinition) else ():
            first, end = source.layer_range
            if not 0 <= first < end:
                yield (
                    f"{case.file} takes the layer_range [{first}, {end}] of model {source.model} "
                    f"at {part.path}, which holds no layer; write the first layer, from 0, and "
                    "the one after the last, such as [0, 3]."
                )
