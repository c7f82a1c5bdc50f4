"""Weights that a merge would silently drop.

MergeKit merges the tensors that its description of an architecture names. If it has no
description, it guesses them. All other tensors of a model never reach the output.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from mergekit.common import ModelReference

from mergekit_metagpt.measure.headers import FLOATS, Header
from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.names import COMPUTED, MASKS, layer_of
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.wording import counted


def lost(
    outputs: Outputs, base: ModelReference | None, models: Mapping[ModelReference, ModelFiles]
) -> Iterator[str]:
    """Find weights that the merge would silently drop.

    A weight is not lost if it is read for some tensor of the output, if it is tied to one that
    is read, or if the config leaves out its model, module or layer on purpose.
    """
    read = set(chain.from_iterable(chain.from_iterable(t.read.values()) for t in outputs.tensors))
    merged = [files for model, files in models.items() if _layers(outputs, model) and files.config]
    merged.sort(key=lambda files: (files.model != base, str(files.model)))
    told: set[str] = set()
    held_by_base = models[base].weights.tensors if base is not None else {}
    for files in merged:
        names = sorted(set(_unread(files, outputs, read)) - told)
        told |= set(names)
        own = [name for name in names if name not in held_by_base]
        if files.model != base and base is not None and own:
            yield (
                f"Model {files.model} holds {counted(own)}, which the base {base} lacks and the "
                "merge would drop; merge a checkpoint without it, or choose the base that "
                "this model was fine-tuned from."
            )
        elif names:
            yield (
                f"Model {files.model} holds {counted(names)}, which the merge would drop, since "
                f"{_why(outputs, files)}; merge the weight files with mergekit-pytorch, which "
                "takes every tensor."
            )


def _why(outputs: Outputs, files: ModelFiles) -> str:
    if outputs.architecture_is_guessed:
        return (
            f"MergeKit does not describe {files.architecture} and guesses its tensors without them"
        )
    return f"MergeKit's description of {files.architecture} does not name them"


def _unread(files: ModelFiles, outputs: Outputs, read: set[str]) -> list[str]:
    """Return the weights of a model that the merge should read, but does not."""
    is_excluded = _excluded(outputs, files)
    names = [
        name
        for name, header in files.weights.tensors.items()
        if name not in read and not _is_computed(name, header) and not is_excluded(name)
    ]
    names = [name for name in names if not is_ignored(files.architecture, name)]
    return _without_ties(names, files, outputs, read) if names else []


def _is_computed(name: str, header: Header) -> bool:
    """Whether a tensor is not a parameter, but a counter or a buffer that models compute."""
    is_mask = name.endswith(MASKS) and len(header.shape) == 4
    return header.dtype not in FLOATS or is_mask or name.endswith(COMPUTED)


def _excluded(outputs: Outputs, files: ModelFiles) -> Callable[[str], bool]:
    """Return a test of names: whether the config leaves out the tensor's module or layer."""
    config: Any = files.config
    layers: set[str] = set()
    names: set[str] = set()
    for module, definition in outputs.architecture.modules.items():
        described = definition.architecture
        prefix = definition.weight_prefix or ""
        taken = _layers(outputs, files.model).get(module, set())
        for number in set(range(described.num_layers(config))) - taken:
            weights = described.layer_weights(number, config) or []
            layers |= {layer_of(prefix + weight.name) or "" for weight in weights}
        if module not in outputs.modules:
            names |= {prefix + weight.name for weight in described.all_weights(config)}
    return lambda name: name in names or layer_of(name) in layers


def _layers(outputs: Outputs, model: ModelReference) -> dict[str, set[int]]:
    """Return the layers of each module that the config takes from a model."""
    found: dict[str, set[int]] = {}
    for module, definition in outputs.modules.items():
        for piece in definition.slices or []:
            for source in piece.sources:
                if source.model == model:
                    found.setdefault(module, set()).update(range(*source.layer_range))
    return found


def _without_ties(
    names: Iterable[str], files: ModelFiles, outputs: Outputs, read: set[str]
) -> list[str]:
    """Leave out second names of tensors that are read."""
    same = {
        other
        for tensor in outputs.tensors
        for load in tensor.merge.loads.values()
        for other in load.tied_names or ()
    }
    if files.is_tied:
        ties = tied_names(files.architecture)
        same |= {name for name in names for one, other in ties if one == name and other in read}
        same |= {name for name in names for one, other in ties if other == name and one in read}
    return [name for name in names if name not in same]
