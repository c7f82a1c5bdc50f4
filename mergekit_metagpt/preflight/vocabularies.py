"""Tokenizers: whether a token id means the same to all models, and can be merged."""

from collections.abc import Iterator
from typing import Any

import torch
from mergekit.common import ModelReference

from mergekit_metagpt.measure.vocabularies import Vocabulary, first_difference, load_vocabulary
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.preflight.tensors import TOKENIZER_WAY
from mergekit_metagpt.wording import BadInputError, reason


def bad_vocabularies(case: Case) -> Iterator[str]:
    """Find tokenizers that cannot be merged; and if they can, tokens that cannot."""
    merged = next((t for t in case.outputs.tensors if t.merge.vocabulary_axis is not None), None)
    if merged:
        models = [model for model in case.models if model in merged.merge.models]
        bad = list(_bad_tokenizers(case, models, merged.name))
        yield from bad or _bad_tokens(case)


def _bad_tokenizers(case: Case, models: list[ModelReference], tensor: str) -> Iterator[str]:
    """Find tokenizers that are broken, missing, or give an id different tokens.

    MergeKit takes a tokenizer that it cannot read for the base's. Models that have none are
    skipped, but for the base if the config asks for a tokenizer.
    """
    first: tuple[ModelReference, Vocabulary] | None = None
    asked = case.outputs.tokenizer
    for model in models:
        cache, trust = case.options.transformers_cache, case.options.trust_remote_code
        try:
            tokens = load_vocabulary(model, cache, trust)
        except BadInputError as error:
            yield from error.args
            continue
        if asked and not tokens and model == case.base:
            yield (
                f"The base {model} has no tokenizer, and {case.file} asks for one (tokenizer); "
                "copy the files of its tokenizer into the base, or leave that setting out."
            )
        if asked or not tokens:
            continue
        first = first or (model, tokens)
        id_ = first_difference(tokens, first[1])
        if id_ is not None:
            yield (
                f"Token {id_} is {tokens[id_]!r} to the tokenizer of model {model} but "
                f"{first[1][id_]!r} to that of {first[0]}, so that the rows of {tensor} mean "
                f"different things; {TOKENIZER_WAY.format(file=case.file)}."
            )


def _bad_tokens(case: Case) -> Iterator[str]:
    """Let MergeKit align rows of zeros: it fails on a token that it has no row for."""
    info = case.outputs.tokenizer_info if case.rows else None
    tensor = next((t for t in case.outputs.tensors if t.merge.vocabulary_is_aligned), None)
    if info is None or tensor is None:
        return
    align: Any = tensor.merge.task.gather_tensors
    axis = tensor.merge.vocabulary_axis
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
        f"correct `tokenizer` in {case.file}, or resize the embeddings of the model to its "
        "tokenizer (resize_token_embeddings of transformers)."
    )
