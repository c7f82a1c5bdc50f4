"""The tensors that are merged with each other, and the parameters that each gets."""

from collections import Counter
from collections.abc import Iterator

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods.base import OptionalTensorPolicy

from mergekit_metagpt.measure.headers import FLOATS
from mergekit_metagpt.planning.outputs import OutputTensor
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.wording import counted

Shape = tuple[int, ...]

TOKENIZER_WAY = (
    "add `tokenizer: {{source: base}}` to {file} to keep the base's tokens, or "
    "`tokenizer: {{source: union}}` to keep all"
)


def missing(case: Case) -> Iterator[str]:
    """Find tensors that some models lack, although nothing is wrong with their weight files."""
    lacking: dict[ModelReference, list[str]] = {}
    for tensor in case.outputs.tensors:
        for model, load in tensor.merge.loads.items():
            is_known = model in tensor.stored or case.models[model].weights.problems
            if not is_known and _fails_without(tensor, model):
                lacking.setdefault(model, []).append(load.tensor)
    for model, names in lacking.items():
        if case.outputs.architecture_is_guessed:
            way = (
                "MergeKit does not describe this architecture and has guessed its tensors; if they "
                "are there under other names, merge the weight files with mergekit-pytorch"
            )
        elif model == case.base:
            way = "complete it, correct its layer_range, or merge only fine-tunes of it"
        else:
            way = "complete it, correct its layer_range, or leave the model out"
        yield f"Model {model} lacks {counted(names)}, which this merge needs of it; {way}."


def _fails_without(tensor: OutputTensor, model: ModelReference) -> bool:
    """Whether the merge fails if a model lacks a tensor; some tensors are optional."""
    if not tensor.merge.loads[model].optional:
        return True
    base, granularity = tensor.merge.base, tensor.merge.granularity
    if granularity and granularity.needs_survey:
        return base in tensor.stored  # the survey compares each expert with it
    spec = merge_methods.get(tensor.merge.task.method_name).spec
    if spec.optional_tensor_policy != OptionalTensorPolicy.ERROR:
        return False
    try:
        spec.contract.validate_ids(list(tensor.stored), base)
    except ValueError:
        return True
    return False


def missing_heads(case: Case) -> Iterator[str]:
    """Find models without a head, where MergeKit would silently take the embeddings for it.

    The embeddings are the head if the model's config ties the two. If it says that the two
    differ, they are not.
    """
    tensors = case.outputs.tensors
    read = Counter(
        (model, name) for t in tensors for model, names in t.read.items() for name in names
    )
    for tensor in tensors:
        for model, (name, *_) in tensor.read.items():
            load = tensor.merge.loads[model]
            is_shared = name in (load.tied_names or ()) and read[model, name] > 1
            # An encoder and its decoder share embeddings, whatever the config says.
            if is_shared and "embed" not in load.tensor and case.models[model].is_tied is False:
                yield (
                    f"Model {model} lacks tensor {load.tensor}, and MergeKit would take {name} for "
                    "it, but its config.json says that they differ (tie_word_embeddings: false); "
                    "complete the model, or correct its config.json."
                )


def left_out(case: Case) -> Iterator[str]:
    """Find models that MergeKit would silently leave out of the tensors after the last layer.

    For those tensors it takes the models of the last slice, but only as many as the first has.
    """
    for tensor in case.outputs.tensors:
        forgotten = [model for model in tensor.merge.models if model not in tensor.merge.loads]
        if forgotten:
            yield (
                f"{case.file} lists more models in the last slice than in the first, and MergeKit "
                f"would leave model {forgotten[0]} out of tensor {tensor.name}; list as many "
                "models in the first slice."
            )
            return


def different_shapes(case: Case) -> Iterator[str]:
    """Find tensors whose shape differs from that in the base, or else in the first model."""
    found: dict[tuple[ModelReference, bool], list[str]] = {}
    for tensor in case.outputs.tensors:
        shapes = {model: header.shape for model, header in tensor.stored.items()}
        first = next((model for model in (case.base, *shapes) if model in shapes), None)
        for model, shape in shapes.items():
            if first is None or shape == shapes[first]:
                continue
            vocabulary = _differ_in_one_axis(shape, shapes[first], tensor.merge.vocabulary_axis)
            if vocabulary and tensor.merge.vocabulary_is_aligned:
                continue
            found.setdefault((model, vocabulary), []).append(
                f"{'Vocabulary tensor' if vocabulary else 'Tensor'} "
                f"{tensor.merge.loads[model].tensor} has shape {list(shape)} in model {model} but "
                f"{list(shapes[first])} in {first}"
            )
    for (_, vocabulary), said in found.items():
        more = f" (and {len(said) - 1} more differ)" if len(said) > 1 else ""
        way = TOKENIZER_WAY.format(file=case.file) if vocabulary else "merge fine-tunes of one base"
        yield f"{said[0]}{more}; {way}."


def _differ_in_one_axis(shape: Shape, other: Shape, axis: int | None) -> bool:
    if axis is None or len(shape) != len(other) or axis >= len(shape):
        return False
    return (*shape[:axis], *shape[axis + 1 :]) == (*other[:axis], *other[axis + 1 :])


def quantized(case: Case) -> Iterator[str]:
    """Find weights that cannot be merged, because they are not floating-point numbers."""
    found: dict[tuple[ModelReference, str], list[str]] = {}
    for tensor in case.outputs.tensors:
        dtypes = {header.dtype for header in tensor.stored.values()}
        for model, header in tensor.stored.items():
            # Buffers of integers are copied, if they are the same everywhere.
            is_buffer = header.torch_dtype is not None and dtypes == {header.dtype}
            if header.dtype not in FLOATS and not is_buffer:
                found.setdefault((model, header.dtype), []).append(tensor.merge.loads[model].tensor)
    for (model, dtype), names in found.items():
        yield (
            f"Model {model} stores {counted(names)} as {dtype}, and quantized or integer weights "
            "cannot be merged; use the float checkpoint that it was made from."
        )


def bad_values(case: Case) -> Iterator[str]:
    """Find parameters that are valid alone, but not together or with the slices."""
    yield from _bad_epsilons(case)
    tensors = case.outputs.tensors
    each = [values for tensor in tensors for values in tensor.merge.model_parameters.values()]
    weights = [values["weight"] for values in each if "weight" in values]
    if weights and not any(weights):
        yield (
            f"{case.file} gives every model the weight 0 for every tensor, so that nothing is "
            "merged; give at least one a weight above 0."
        )
    moved = next((tensor.name for tensor in tensors if tensor.merge.moves_layers), None)
    if moved:
        yield (
            f"{case.file} sets granularity: layer, but its slices put tensors of another layer "
            f"at {moved}; use granularity: tensor or granularity: model."
        )


def _bad_epsilons(case: Case) -> Iterator[str]:
    """DELLA keeps entries with probabilities from density − epsilon to density + epsilon."""
    told = set()
    for tensor in case.outputs.tensors:
        if "della" not in tensor.merge.task.method_name:
            return
        for model, values in tensor.merge.model_parameters.items():
            density, epsilon = values.get("density"), values.get("epsilon")
            if density is None or epsilon is None or not 0 < density < 1:
                continue
            within = density - epsilon > 0 and density + epsilon < 1
            if not within and (model, density, epsilon) not in told:
                told.add((model, density, epsilon))
                yield (
                    f"{case.file} gives model {model} density {density} and epsilon {epsilon} for "
                    f"tensor {tensor.name}, but density ± epsilon has to stay between 0 and 1; "
                    f"set an epsilon below {min(density, 1 - density):g}."
                )
