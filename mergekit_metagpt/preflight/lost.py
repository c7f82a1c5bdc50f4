"""Weights that a merge would silently drop.

MergeKit merges the tensors that its description of an architecture names. If it has no
description, it guesses them. All other tensors of a model never reach the output.
"""

from collections.abc import Iterator
from typing import Any

from mergekit.common import ModelReference

from mergekit_metagpt.measure.headers import is_computed
from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.wording import counted


def lost(case: Case) -> Iterator[str]:
    """Find weights that the merge would silently drop.

    A weight is not lost if it is read for some tensor of the output, if it is tied to one that
    is read, or if the config leaves out its model, module or layer on purpose.
    """
    outputs, base = case.outputs, case.base
    read = {name for t in outputs.tensors for names in t.read.values() for name in names}
    told: set[str] = set()
    for model, files in case.models.items():
        if not (files.config and _layers(outputs, model)):
            continue
        names = sorted(set(_unread(files, outputs, read)) - told)
        told |= set(names)
        own = [name for name in names if base and name not in case.models[base].weights.tensors]
        if own:
            yield (
                f"Model {model} holds {counted(own)}, which the base {base} lacks and the "
                "merge would drop; merge a checkpoint without it, or choose the base that "
                "this model was fine-tuned from."
            )
        elif names:
            kind = files.architecture
            why = f"MergeKit's description of {kind} does not name them"
            if outputs.architecture_is_guessed:
                why = f"MergeKit does not describe {kind} and guesses its tensors without them"
            yield (
                f"Model {model} holds {counted(names)}, which the merge would drop, since {why}; "
                "merge the weight files with mergekit-pytorch, which takes every tensor."
            )


def _unread(files: ModelFiles, outputs: Outputs, read: set[str]) -> list[str]:
    """Return the weights of a model that the merge should read, but does not."""
    names, layers = _left_out_on_purpose(outputs, files)
    unread = [
        name
        for name, header in files.weights.tensors.items()
        if not (name in read or name in names or layer_of(name) in layers)
        and not is_computed(name, header)
        and not is_ignored(files.architecture, name)
    ]
    others = _second_names(files, outputs, read) if unread else set()
    return [name for name in unread if name not in others]


def _left_out_on_purpose(outputs: Outputs, files: ModelFiles) -> tuple[set[str], set[str]]:
    """Return the names of modules, and the layers, that the config does not take from a model."""
    config: Any = files.config
    names: set[str] = set()
    layers: set[str] = set()
    for module, definition in outputs.architecture.modules.items():
        described = definition.architecture
        prefix = definition.weight_prefix or ""
        taken = _layers(outputs, files.model).get(module, set())
        for number in set(range(described.num_layers(config))) - taken:
            weights = described.layer_weights(number, config) or []
            layers |= {layer_of(prefix + weight.name) or "" for weight in weights}
        if module not in outputs.modules:
            names |= {prefix + weight.name for weight in described.all_weights(config)}
    return names, layers


def _layers(outputs: Outputs, model: ModelReference) -> dict[str, set[int]]:
    """Return the layers of each module that the config takes from a model."""
    found: dict[str, set[int]] = {}
    for module, definition in outputs.modules.items():
        for piece in definition.slices or []:
            for source in piece.sources:
                if source.model == model:
                    found.setdefault(module, set()).update(range(*source.layer_range))
    return found


def _second_names(files: ModelFiles, outputs: Outputs, read: set[str]) -> set[str]:
    """Return names under which a model may hold a tensor that is read under another name."""
    loads = [load for tensor in outputs.tensors for load in tensor.merge.loads.values()]
    names = {name for load in loads for name in load.tied_names or ()}
    for pair in tied_names(files.architecture) if files.is_tied else ():
        if not read.isdisjoint(pair):
            names |= set(pair)
    return names
