"""The models side by side: whether they are fine-tunes of one base, compute and speak alike.

The output gets the config.json of the base, so it computes as the base does. Equal shapes do not
show that an expert was trained to compute otherwise.
"""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_metagpt.measure.identity import Stat, stat_of
from mergekit_metagpt.measure.vocabularies import Vocabulary, first_difference, load_vocabulary
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.preflight.tensors import tokenizer_way
from mergekit_metagpt.wording import BadInputError, reason

# The names of settings that split tensors of one shape in other ways.
_HEADS = re.compile("heads$|n_head$|head_dim$")
# Parts of the names of settings that change what a model computes, but no shape.
_COMPUTES = re.compile(
    "rope|rotary|hidden_act|activation|_eps|window|softcap|scal|multiplier|per_tok|topk|layer_types"
    "|parallel_residual|clip_qkv|alibi|position_embedding_type|causal"
)


def unusable(job: Job) -> Iterator[str]:
    """Find what is wrong with each model alone."""
    for files in job.models.values():
        yield from files.problems
        yield from bad_adapters(files, job.options)


def same_models(job: Job) -> Iterator[str]:
    """Find models that are listed under two names, which their weight files show."""
    seen: dict[frozenset[Stat], ModelReference] = {}
    for model, files in job.models.items():
        if model.lora and not files.adapter:
            continue  # the adapter is on the hub
        paths = {files.adapter or "", *(header.file for header in files.weights.tensors.values())}
        stats = frozenset(map(stat_of, paths)) - {None}
        first = seen.setdefault(stats, model) if stats else model
        if first is not model:
            yield (
                f"Model {model} is {first} under another name, with the same weight files; leave "
                "one of them out, or use one name for both."
            )


def different_heads(job: Job) -> Iterator[str]:
    """Find models whose attention is split otherwise than that of the base, or of the first."""
    for said, _ in _differing(job, _HEADS, also_unset=False):
        yield (
            f"{said}, so that tensors of one shape mean different things; merge fine-tunes of one "
            "base."
        )


def different_settings(job: Job) -> Iterator[str]:
    """Find models that compute otherwise than the base, or the first, with weights of one shape."""
    for said, first in _differing(job, _COMPUTES):
        whose = f", that of {first}" if first == job.parsed.base_model else ""
        yield (
            f"{said}, so that the two compute otherwise, but a merge has only one "
            f"config.json{whose}; test the result."
        )


def _differing(
    job: Job, names: re.Pattern[str], also_unset: bool = True
) -> Iterator[tuple[str, ModelReference]]:
    """Yield how the config of a model differs from that of the base, or else of the first model."""
    known = [(it.model, it.config.get_text_config()) for it in job.models.values() if it.config]
    for model, config in known[1:]:
        first, its = known[0]
        own, others = (
            {key: value for key, value in _settings(it.to_dict()) if names.search(key)}
            for it in (config, its)
        )
        keys = own.keys() | others.keys() if also_unset else own.keys() & others.keys()
        differ = []
        for key in sorted(key for key in keys if own.get(key) != others.get(key)):
            values = [textwrap.shorten(str(it.get(key, "unset")), 60) for it in (own, others)]
            differ.append(f"{key} ({values[0]}, not {values[1]})")
        if differ and config.model_type == its.model_type:
            said = ", ".join(differ)
            yield f"The config.json of model {model} differs from that of {first} in {said}", first


def _settings(said: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config, but for empty ones; those within others with a dot."""
    for key, value in said.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", its) for inner, its in _settings(value))
        elif value is not None:
            yield key, value


def bad_vocabularies(job: Job) -> Iterator[str]:
    """Find tokenizers that cannot be merged; and if they can, tokens that cannot."""
    merged = next((t for t in job.outputs.tensors if t.vocabulary_axis is not None), None)
    if merged:
        models = [model for model in job.models if model in merged.task.model_order]
        bad = list(_bad_tokenizers(job, models, merged.name))
        yield from bad or _bad_tokens(job)


def _bad_tokenizers(job: Job, models: list[ModelReference], tensor: str) -> Iterator[str]:
    """Find tokenizers that are broken, missing, or give an id different tokens.

    MergeKit takes a tokenizer that it cannot read for the base's. Models that have none are
    skipped, but for the base if the config asks for a tokenizer.
    """
    known: dict[ModelReference, Vocabulary] = {}
    asked, options = job.outputs.tokenizer, job.options
    for model in models:
        try:
            tokens = load_vocabulary(model, options.transformers_cache, options.trust_remote_code)
        except BadInputError as error:
            yield from error.args
            continue
        if tokens:
            known[model] = tokens
        elif asked and model == job.parsed.base_model:
            yield (
                f"The base {model} has no tokenizer, and {job.config} asks for one (tokenizer); "
                "copy the files of its tokenizer into the base, or leave that setting out."
            )
    for model, tokens in () if asked else known.items():
        first, its = next(iter(known.items()))
        id_ = first_difference(tokens, its)
        if id_ is not None:
            yield (
                f"Token {id_} is {tokens[id_]!r} to the tokenizer of model {model} but "
                f"{its[id_]!r} to that of {first}, so that the rows of {tensor} mean "
                f"different things; {tokenizer_way(job)}."
            )


def _bad_tokens(job: Job) -> Iterator[str]:
    """Let MergeKit align rows of zeros: it fails on a token that it has no row for."""
    info = job.outputs.tokenizer_info
    tensor = next((t for t in job.outputs.tensors if t.vocabulary_is_aligned), None)
    if info is None or tensor is None:
        return
    align: Any = tensor.task.gather_tensors
    axis = tensor.vocabulary_axis
    rows = {
        model: torch.zeros([n if at == axis else 1 for at, n in enumerate(header.shape)])
        for model, header in tensor.stored.items()
    }
    try:
        align.execute(tokenizer_info=info, tensors=rows)
        return
    except KeyError as error:
        (id_,) = error.args
        lacking = next(model for model, rows in info.permutations.items() if id_ not in rows)
        why = f"{info.tokenizer.convert_ids_to_tokens(id_)!r} has none in {lacking}"
    except Exception as error:  # MergeKit raises many types
        why = reason(error)
    yield (
        f"MergeKit cannot give every token of the merge a row of {tensor.name} ({why}); "
        f"correct `tokenizer` in {job.config}, or resize the embeddings of the model to its "
        "tokenizer (resize_token_embeddings of transformers)."
    )
