"""A merge, read back: numbers that overflowed, and what MergeKit copies from the base made true."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.headers import FLOAT_NAMES, FLOATS
from mergekit_metagpt.measure.locations import Directory, locate
from mergekit_metagpt.measure.vocabularies import load_vocabulary
from mergekit_metagpt.measure.weights import Weights, read_weights
from mergekit_metagpt.mergekit_private import tied_names
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)
_GENERATION = "generation_config.json"


def describe(directory: Path, config: MergeConfiguration, options: MergeOptions) -> None:
    """Make ``config.json`` describe the written weights, and keep the base's generation config.

    A file that is right already is not written again. What somebody has to decide is a warning,
    as is a failure: the weights are complete, and may have taken hours.
    """
    try:
        for sentence in _corrections(directory, config, options):
            LOG.warning("%s", sentence)
    except Exception as error:
        LOG.warning(
            "What MergeKit wrote beside the weights could not be checked (%s); compare the "
            "config.json of the merge with that of the base before you use it.",
            reason(error),
        )


def _corrections(
    directory: Path, config: MergeConfiguration, options: MergeOptions
) -> Iterator[str]:
    base = config.base_model or config.referenced_models()[0]  # whose config MergeKit takes
    model = ModelFiles(base, base.config(options.trust_remote_code))
    file = directory / "config.json"
    text = file.read_text("utf-8")
    said = json.loads(text)
    weights = read_weights(Directory(str(directory), str(directory)))
    _untie(said, model, weights)
    _correct_dtypes(said, weights)
    yield from _correct_vocabulary(said, model, weights)
    if said != json.loads(text):
        file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    if options.copy_tokenizer or (directory / "tokenizer_config.json").exists():
        yield from _keep_generation(directory, base, options)


def _untie(said: dict[str, Any], model: ModelFiles, weights: Weights) -> None:
    """Say that the head is not the embeddings, if both are stored and differ."""
    loader: Any = LazyTensorLoader(weights.index, lazy_unpickle=False)
    for pair in _ties(model, weights) if model.is_tied else ():
        head, table = map(loader.get_tensor, pair)
        if head.shape != table.shape or (head != table).any():
            for section in _sections(said, model):
                section.update(dict.fromkeys(section.keys() & {"tie_word_embeddings"}, False))
            said["tie_word_embeddings"] = False


def _ties(model: ModelFiles, weights: Weights) -> list[tuple[str, str]]:
    """Return each head that is stored beside the embeddings that it may be tied to."""
    named = [(it.name, table) for it in _described(model) for table in it.tied_names or ()]
    return [
        (head, table)
        for pair in tied_names(model.architecture) or named
        # The embeddings of an encoder are those of its decoder, whatever the config says.
        if pair[0].endswith("weight") and "embed" not in pair[0]
        if (head := _stored(pair[0], weights)) and (table := _stored(pair[1], weights))
    ]


def _stored(name: str, weights: Weights) -> str | None:
    """Return the name of a tensor in the files, which may have another prefix."""
    end = "." + ".".join(name.split(".")[-2:])
    names = [name, *(other for other in weights.tensors if f".{other}".endswith(end))]
    return next((it for it in names if it in weights.tensors), None)


def _correct_vocabulary(said: dict[str, Any], model: ModelFiles, weights: Weights) -> Iterator[str]:
    held = [it for it in _described(model) if it.name in weights.tensors]
    axes = {it.name: it.vocabulary_axis for it in held if it.vocabulary_axis is not None}
    rows = {name: weights.tensors[name].shape[axis] for name, axis in axes.items()}
    sections = [it for it in _sections(said, model) if "vocab_size" in it]
    if len(set(rows.values())) > 1:
        sizes = ", ".join(f"{name} {count}" for name, count in rows.items())
        yield (
            f"The merge cannot be loaded, since its vocabulary tensors differ in rows ({sizes}); "
            "add `tokenizer: {source: union}` to the config and merge again."
        )
    elif rows and sections:
        wrong, right = sections[-1]["vocab_size"], max(rows.values())
        for section in (it for it in sections if it["vocab_size"] == wrong):
            section["vocab_size"] = right


def _described(model: ModelFiles) -> list[WeightInfo]:
    return model.description.all_weights(model.config) if model.description and model.config else []


def _sections(said: dict[str, Any], model: ModelFiles) -> list[dict[str, Any]]:
    """Return the config and, if it is nested, the part that is about text."""
    text = model.config and model.config.get_text_config()
    names = [name for name, value in vars(model.config).items() if value is text]
    return [said, *(said[name] for name in names if name in said)]


def _correct_dtypes(said: dict[str, Any], weights: Weights) -> None:
    """Let a config name the dtype of most numbers, and its parts one that is written."""
    sizes = dict.fromkeys(FLOAT_NAMES, 0)
    for header in weights.tensors.values():
        if header.dtype in FLOATS:
            sizes[str(header.torch_dtype).removeprefix("torch.")] += header.bytes
    main = max(sizes, key=sizes.__getitem__)
    for part in (said, *(value for value in said.values() if isinstance(value, dict))):
        for key in part.keys() & {"dtype", "torch_dtype"}:
            named = str(part[key]).removeprefix("torch.")  # with which no model can be loaded
            if named in sizes:
                part[key] = named if part is not said and sizes[named] else main


def _keep_generation(directory: Path, base: ModelReference, options: MergeOptions) -> Iterator[str]:
    """Copy the base's generation config if MergeKit has not, and its ids mean the same."""
    source = Path(locate(base.model, options).path, _GENERATION)
    if not source.is_file() or (directory / _GENERATION).exists():
        return
    merged = ModelReference(model=ModelPath(path=str(directory)))
    cache, trust = options.transformers_cache, options.trust_remote_code
    there, here = (load_vocabulary(model, cache, trust) or {} for model in (base, merged))
    try:
        ids = _token_ids(json.loads(source.read_text("utf-8"))) if there and here else []
    except (ValueError, AttributeError, TypeError) as error:
        yield f"{source} was not copied, since it is corrupt ({reason(error)}); write it again."
        return
    for id_ in ids:
        if (old := there.get(id_)) != (new := here.get(id_)):
            why = f"since token {id_} is {old!r} there but {new!r} in the merge"
            yield f"{source} was not copied, {why}; write one with new ids, or texts may not end."
            return
    shutil.copy(source, directory)


def _token_ids(generation: dict[str, Any]) -> list[int]:
    """Return the ids of all tokens that a generation config names."""
    ends = ("_token_id", "suppress_tokens")
    found = [value for key, value in generation.items() if key.endswith(ends)]
    return sorted({i for it in found for i in (it if isinstance(it, list) else [it])} - {None})


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Read a merge back, and refuse it if it overflowed float16.

    In another ``out_dtype`` only numbers above 3.39e38 can overflow, which no model has; to find
    them, every such merge would be read back.
    """
    if dtype_from_name(out_dtype) != torch.float16:
        return
    loader: Any = LazyTensorLoader.from_disk(str(merged), lazy_unpickle=False)
    names = loader.index.tensor_paths  # shard by shard
    overflowing = next((it for it in names if not loader.get_tensor(it).isfinite().all()), None)
    del loader  # which closes its files: Windows removes no open ones
    if overflowing:
        raise BadInputError(
            f"Merging tensor {overflowing} overflows {torch.float16}; set a wider dtype, such as "
            "out_dtype: bfloat16 or float32."
        )
