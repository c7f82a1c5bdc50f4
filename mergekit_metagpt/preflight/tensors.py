"""The tensors that are merged with each other, the parameters that each gets, and those left out.

MergeKit merges the tensors that its description of an architecture names. If it has no
description, it guesses them. All other tensors of a model never reach the output.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.base import OptionalTensorPolicy

from mergekit_metagpt.core.granularities import moved
from mergekit_metagpt.measure.headers import FLOATS, unread
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.planner import TensorMerge
from mergekit_metagpt.wording import counted


def tokenizer_way(job: Job) -> str:
    """Say what to do about vocabularies that differ."""
    return (
        f"add `tokenizer: {{source: base}}` to {job.config} to keep the base's tokens, or "
        "`tokenizer: {source: union}` to keep all"
    )


def missing(job: Job) -> Iterator[str]:
    """Find tensors that some models lack, although nothing is wrong with their weight files."""
    lacking: dict[ModelReference, list[str]] = {}
    for tensor in job.outputs.tensors:
        for model, load in tensor.loads.items():
            is_known = model in tensor.stored or job.models[model].weights.problems
            if not is_known and _fails_without(tensor, load):
                lacking.setdefault(model, []).append(load.tensor)
    for model, names in lacking.items():
        way = "complete it, correct its layer_range, or merge only fine-tunes of one base"
        if not job.models[model].description:
            way = (
                "MergeKit does not describe this architecture and has guessed its tensors; if they "
                "are there under other names, merge the weight files with mergekit-pytorch"
            )
        yield f"Model {model} lacks {counted(names)}, which this merge needs of it; {way}."


def _fails_without(tensor: TensorMerge, load: LoadTensor) -> bool:
    """Whether the merge fails if a model lacks a tensor; some tensors are optional."""
    if not load.optional:
        return True
    base = tensor.task.base_model
    if tensor.granularity.needs_survey:
        return base in tensor.stored  # the survey compares each expert with it
    spec = merge_methods.get(tensor.task.method_name).spec
    try:
        spec.contract.validate_ids(list(tensor.stored), base)
    except ValueError:
        return bool(spec.optional_tensor_policy == OptionalTensorPolicy.ERROR)
    return False


def missing_heads(job: Job) -> Iterator[str]:
    """Find models without a head, where MergeKit would silently take the embeddings for it.

    The embeddings are the head if the model's config ties the two. If it says that the two
    differ, they are not.
    """
    tensors = job.outputs.tensors
    read = Counter(
        (model, name) for t in tensors for model, names in t.read.items() for name in names
    )
    for tensor in tensors:
        for model, (name, *_) in tensor.read.items():
            load = tensor.loads[model]
            is_shared = name in (load.tied_names or ()) and read[model, name] > 1
            # An encoder and its decoder share embeddings, whatever the config says.
            if is_shared and "embed" not in load.tensor and job.models[model].is_tied is False:
                yield (
                    f"Model {model} lacks tensor {load.tensor}, and MergeKit would take {name} for "
                    "it, but its config.json says that they differ (tie_word_embeddings: false); "
                    "complete the model, or correct its config.json."
                )


def left_out(job: Job) -> Iterator[str]:
    """Find models that MergeKit would silently leave out of the tensors after the last layer.

    For those tensors it takes the models of the last slice, but only as many as the first has.
    """
    merges = job.outputs.tensors
    found = ((it, model) for it in merges for model in it.task.model_order if model not in it.loads)
    for merge, model in islice(found, 1):
        yield (
            f"{job.config} lists more models in the last slice than in the first, and MergeKit "
            f"would leave model {model} out of tensor {merge.name}; list as many models in the "
            "first slice."
        )


def different_shapes(job: Job) -> Iterator[str]:
    """Find tensors whose shape differs from that in the base, or else in the first model."""
    found: dict[tuple[ModelReference, bool], list[str]] = {}
    for tensor in job.outputs.tensors:
        shapes = {model: list(header.shape) for model, header in tensor.stored.items()}
        first = next((model for model in (job.parsed.base_model, *shapes) if model in shapes), None)
        expected = shapes[first] if first else []
        for model, shape in shapes.items():
            pairs = enumerate(zip_longest(shape, expected))
            differing = [axis for axis, (own, others) in pairs if own != others]
            is_vocabulary = differing == [tensor.vocabulary_axis]
            if differing and not (is_vocabulary and tensor.vocabulary_is_aligned):
                found.setdefault((model, is_vocabulary), []).append(
                    f"{'Vocabulary tensor' if is_vocabulary else 'Tensor'} "
                    f"{tensor.loads[model].tensor} has shape {shape} in model {model} but "
                    f"{expected} in {first}"
                )
    for (_, is_vocabulary), said in found.items():
        more = f" (and {len(said) - 1} more differ)" if len(said) > 1 else ""
        way = tokenizer_way(job) if is_vocabulary else "merge fine-tunes of one base"
        yield f"{said[0]}{more}; {way}."


def quantized(job: Job) -> Iterator[str]:
    """Find weights that cannot be merged, because they are not floating-point numbers."""
    found: dict[tuple[ModelReference, str], list[str]] = {}
    for tensor in job.outputs.tensors:
        dtypes = {header.dtype for header in tensor.stored.values()}
        for model, header in tensor.stored.items():
            # Buffers of integers are copied, if they are the same everywhere.
            is_buffer = header.torch_dtype is not None and dtypes == {header.dtype}
            if header.dtype not in FLOATS and not is_buffer:
                found.setdefault((model, header.dtype), []).append(tensor.loads[model].tensor)
    for (model, dtype), names in found.items():
        yield (
            f"Model {model} stores {counted(names)} as {dtype}, and quantized or integer weights "
            "cannot be merged; use the float checkpoint that it was made from."
        )


def bad_values(job: Job) -> Iterator[str]:
    """Find parameters that are valid alone, but not together or with the slices."""
    merges = job.outputs.tensors
    each = [(merge, *pair) for merge in merges for pair in merge.model_parameters.items()]
    weights = [values["weight"] for *_, values in each if "weight" in values]
    if weights and not any(weights):
        yield (
            f"{job.config} gives every model the weight 0 for every tensor, so that nothing is "
            "merged; give at least one a weight above 0."
        )
    if not_there := next((merge.name for merge in merges if merge.moves_layers), None):
        yield str(moved(not_there))
    # DELLA keeps entries with probabilities from density − epsilon to density + epsilon.
    for merge, model, values in each if "della" in job.parsed.merge_method else ():
        density, epsilon = values.get("density", 1), values.get("epsilon", 0)
        if 0 < (limit := min(density, 1 - density)) <= epsilon:
            yield (
                f"{job.config} gives model {model} the density {density} and the epsilon {epsilon} "
                f"for tensor {merge.name}, but density ± epsilon has to stay between 0 and 1; set "
                f"an epsilon below {limit:g}."
            )
            return


def lost(job: Job) -> Iterator[str]:
    """Find weights that the merge would silently drop.

    A weight is not lost if it is read for some tensor of the output, if it is tied to one that
    is read, or if the config leaves out its model, module or layer on purpose.
    """
    base = job.parsed.base_model
    read = {name for t in job.outputs.tensors for names in t.read.values() for name in names}
    loads = [load for t in job.outputs.tensors for load in t.loads.values()]
    told: set[str] = set()
    for model, files in job.models.items():
        names = sorted(set(_unread(job, files, read, loads)) - told)
        told |= set(names)
        own = [name for name in names if base and name not in job.models[base].weights.tensors]
        if own:
            yield (
                f"Model {model} holds {counted(own)}, which the base {base} lacks and the "
                "merge would drop; merge a checkpoint without it, or choose the base that "
                "this model was fine-tuned from."
            )
        elif names:
            yield (
                f"Model {model} holds {counted(names)}, which MergeKit does not know in a "
                f"{files.architecture} and the merge would drop; merge the weight files with "
                "mergekit-pytorch, which takes every tensor."
            )


def _unread(job: Job, files: ModelFiles, read: set[str], loads: list[LoadTensor]) -> list[str]:
    """Return the weights of a model that the merge should read, but does not."""
    config: Any = files.config
    taken = {load.tensor for load in loads if load.model == files.model}
    if not (config and taken):
        return []
    # What MergeKit describes and does not read, the config leaves out on purpose; and with a
    # layer that it does not take all that is in it.
    described = {weight.name for weight in job.outputs.architecture.all_weights(config)}
    left_out = {layer_of(name) for name in described} - {layer_of(name) for name in taken} - {None}
    held = {
        name: header
        for name, header in files.weights.tensors.items()
        if name not in described and layer_of(name) not in left_out
    }
    # Names under which a model may hold a tensor that is read under another name.
    others = {name for load in loads for name in load.tied_names or ()}
    return unread(held, read | others, files.architecture, bool(files.is_tied))
