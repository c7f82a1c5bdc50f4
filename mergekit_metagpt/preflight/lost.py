"""Weights that a merge would silently drop.

MergeKit merges the tensors that its description of an architecture names. If it has no
description, it guesses them. All other tensors of a model never reach the output.
"""

from collections.abc import Iterator
from typing import Any

from mergekit_metagpt.measure.headers import is_computed
from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.wording import counted


def lost(case: Case) -> Iterator[str]:
    """Find weights that the merge would silently drop.

    A weight is not lost if it is read for some tensor of the output, if it is tied to one that
    is read, or if the config leaves out its model, module or layer on purpose.
    """
    base = case.base
    read = {name for t in case.outputs.tensors for names in t.read.values() for name in names}
    told: set[str] = set()
    for model, files in case.models.items():
        names = sorted(set(_unread(case, files, read)) - told)
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
            if case.outputs.architecture_is_guessed:
                why = f"MergeKit does not describe {kind} and guesses its tensors without them"
            yield (
                f"Model {model} holds {counted(names)}, which the merge would drop, since {why}; "
                "merge the weight files with mergekit-pytorch, which takes every tensor."
            )


def _unread(case: Case, files: ModelFiles, read: set[str]) -> list[str]:
    """Return the weights of a model that the merge should read, but does not."""
    config: Any = files.config
    loads = [it for tensor in case.outputs.tensors for it in tensor.merge.loads.values()]
    taken = {load.tensor for load in loads if load.model == files.model}
    if not (config and taken):
        return []
    # What MergeKit describes and does not read, the config leaves out on purpose; and with a
    # layer that it does not take all that is in it.
    described = {weight.name for weight in case.outputs.architecture.all_weights(config)}
    left_out = {layer_of(name) for name in described} - {layer_of(name) for name in taken}
    unread = [
        name
        for name, header in files.weights.tensors.items()
        if not (name in read or name in described or layer_of(name) in left_out)
        and not is_computed(name, header)
        and not is_ignored(files.architecture, name)
    ]
    # Names under which a model may hold a tensor that is read under another name.
    others = {name for load in loads for name in load.tied_names or ()}
    for pair in tied_names(files.architecture) if files.is_tied else ():
        others |= set(pair) if read & set(pair) else set()
    return [name for name in unread if name not in others]
