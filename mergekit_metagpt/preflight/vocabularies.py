"""Tokenizers: whether a token id means the same to all models, and can be merged."""

from collections.abc import Iterator
from typing import Any

from mergekit.common import ModelReference
from mergekit.tokenizer import TokenizerInfo
from mergekit.tokenizer.config import ModelTokenEmbedding

from mergekit_metagpt.measure.vocabularies import Vocabulary, first_difference, load_vocabulary
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.preflight.tensors import TOKENIZER_WAY
from mergekit_metagpt.wording import BadInputError


def bad_vocabularies(case: Case) -> Iterator[str]:
    """Find tokenizers that cannot be merged; and if they can, tokens that cannot."""
    bad = list(_bad_tokenizers(case))
    yield from bad or _bad_tokens(case)


def _bad_tokenizers(case: Case) -> Iterator[str]:
    """Find tokenizers that are broken, missing, or give an id different tokens.

    MergeKit takes a tokenizer that it cannot read for the base's. Models that have none are
    skipped, but for the base if the config asks for a tokenizer.
    """
    merged = [t for t in case.outputs.tensors if t.merge.vocabulary_axis is not None]
    first: tuple[ModelReference, Vocabulary] | None = None
    cache, trust = case.options.transformers_cache, case.options.trust_remote_code
    for model in case.models:
        if not (merged and model in merged[0].merge.models):
            continue
        try:
            tokens = load_vocabulary(model, cache, trust)
        except BadInputError as error:
            yield from error.args
            continue
        if not tokens and case.outputs.tokenizer and model == case.base:
            yield (
                f"The base {model} has no tokenizer, and {case.file} asks for one (tokenizer); "
                "copy the files of its tokenizer into the base, or leave that setting out."
            )
        if not tokens or case.outputs.tokenizer:
            continue
        first = first or (model, tokens)
        id_ = first_difference(tokens, first[1])
        if id_ is not None:
            yield (
                f"Token {id_} is {tokens[id_]!r} to the tokenizer of model {model} but "
                f"{first[1][id_]!r} to that of {first[0]}, so that the rows of "
                f"{merged[0].name} mean different things; {TOKENIZER_WAY.format(file=case.file)}."
            )


def _bad_tokens(case: Case) -> Iterator[str]:
    """Find tokens of the output's tokenizer that MergeKit has no row for, and fails on."""
    info = case.outputs.tokenizer_info if case.rows else None
    if info is None:
        return
    settings = (case.config.tokenizer.tokens if case.config.tokenizer else None) or {}
    vocabulary = info.tokenizer.get_vocab()
    for model, rows in info.permutations.items():
        lacking = [token for token, id_ in vocabulary.items() if id_ not in rows]
        if lacking and model == case.base and lacking[0] in settings:
            yield (
                f"{case.file} adds the token {lacking[0]!r} to `tokenizer: {{source: base}}`, and "
                "MergeKit fails on a token that the base does not have; write `source: union`."
            )
        elif lacking:
            yield (
                f"The tokenizer of model {model} has the token {lacking[0]!r}, for which the model "
                "has no row; resize its embeddings (resize_token_embeddings of transformers), or "
                "remove the token from its tokenizer."
            )
    for token, setting in settings.items():
        id_ = vocabulary[token]
        lacked = any(rows.get(id_, -1) < 0 for rows in info.permutations.values())
        if not (setting.force or lacked):
            continue
        if complaint := _complaint(setting.source, id_, case.outputs, info):
            yield f"{case.file} is wrong at the token {token!r} of its tokenizer: {complaint}."


def _complaint(source: Any, id_: int, outputs: Outputs, info: TokenizerInfo) -> str | None:
    """Return what is wrong with the source of a token."""
    if source is None:
        return "it has no source; add one, such as `source: {kind: zero}`"
    model = getattr(source, "model", None) if isinstance(source, ModelTokenEmbedding) else source
    if not isinstance(model, ModelReference):
        return None  # a row of zeros
    if model not in info.permutations:
        return f"model {model} is not in the merge; name a model that is"
    if not isinstance(source, ModelTokenEmbedding):
        has_it = info.permutations[model].get(id_, -1) >= 0
        return None if has_it else f"model {model} does not have it; name a model that does"
    known = info.original_vocabs.get(model, {})
    if source.token is not None and source.token not in known:
        return f"model {model} has no token {source.token!r}; name one that it has"
    rows = min(
        tensor.stored[model].shape[tensor.merge.vocabulary_axis]
        for tensor in outputs.tensors
        if tensor.merge.vocabulary_axis is not None and model in tensor.stored
    )
    if source.token_id is not None and not 0 <= source.token_id < rows:
        return f"model {model} has {rows} rows, and none of number {source.token_id}"
    return None
