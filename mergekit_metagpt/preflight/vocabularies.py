"""Tokenizers: whether a token id means the same to all models."""

from collections.abc import Iterator

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.vocabularies import Vocabulary, first_difference, load_vocabulary
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.preflight.tensors import TOKENIZER_WAY


def different_tokenizers(
    outputs: Outputs,
    base: ModelReference | None,
    options: MergeOptions,
    file: str,
) -> Iterator[str]:
    """Find an id that stands for different tokens; models without a tokenizer are skipped."""
    merged = [tensor for tensor in outputs.tensors if tensor.merge.vocabulary_axis is not None]
    if not merged or merged[0].merge.vocabulary_is_aligned:
        return
    models = sorted(merged[0].merge.models, key=lambda model: (model != base, str(model)))
    first: tuple[ModelReference, Vocabulary] | None = None
    for model in models:
        tokens = load_vocabulary(model, options.transformers_cache, options.trust_remote_code)
        if not tokens:
            continue
        first = first or (model, tokens)
        id_ = first_difference(tokens, first[1])
        if id_ is not None:
            yield (
                f"Token {id_} is {tokens[id_]!r} to the tokenizer of model {model} but "
                f"{first[1][id_]!r} to that of {first[0]}, so that the rows of "
                f"{merged[0].name} mean different things; {TOKENIZER_WAY.format(file=file)}."
            )
