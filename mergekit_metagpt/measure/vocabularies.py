"""Load tokenizers, and compare what the rows of two models' vocabulary tensors mean."""

import logging
from functools import lru_cache
from typing import Any

import transformers
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

LOG = logging.getLogger(__name__)

# A model's tokens by token id.
Vocabulary = dict[int, str]


class DifferentVocabularyError(Exception):
    """The rows of a vocabulary tensor mean different tokens in the base and in an expert."""


def load_tokenizer(
    model: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> Any | None:
    """Return a model's tokenizer, or None if none can be loaded; the log says why.

    Args:
        model: the model; if it has a LoRA adapter, the model under the adapter is used.
        cache_dir: MergeKit's ``--transformers-cache``.
        trust_remote_code: MergeKit's option of this name.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
        )
    except Exception as error:  # the many loaders of transformers raise many types
        LOG.info("No tokenizer could be loaded for %s: %s", model, error)
        return None


def load_vocabulary(
    model: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> Vocabulary | None:
    """Return a model's tokens by token id, or None if no tokenizer can be loaded."""
    tokenizer = load_tokenizer(model, cache_dir, trust_remote_code)
    if tokenizer is None:
        return None
    return {id_: token for token, id_ in tokenizer.get_vocab().items()}


def first_difference(first: Vocabulary, second: Vocabulary) -> int | None:
    """Return the smallest id with a different token in each vocabulary, or None."""
    return next((i for i in sorted(first) if second.get(i, first[i]) != first[i]), None)


def compare_vocabularies(
    weight: WeightInfo, base: tuple[ModelReference, Tensor], expert: tuple[ModelReference, Tensor]
) -> None:
    """Compare one vocabulary tensor of the base and of an expert, and their tokenizers.

    Raises:
        DifferentVocabularyError: if the rows cannot be subtracted. The message says why.
    """
    (origin, rows), (model, others) = base, expert
    if others.shape != rows.shape:
        raise DifferentVocabularyError(
            f"Vocabulary tensor {weight.name} has shape {list(others.shape)} in {model} but "
            f"{list(rows.shape)} in {origin}"
        )
    cache = LoaderCache()
    if not tokenizers_agree(origin, model, cache.hf_cache_dir, cache.trust_remote_code):
        raise DifferentVocabularyError(
            f"The tokenizers of {model} and {origin} give the rows of {weight.name} "
            "different meanings"
        )


@lru_cache(maxsize=256)
def tokenizers_agree(
    first: ModelReference, second: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> bool:
    """Return whether two models agree on the token of every id that both have.

    If a tokenizer cannot be loaded, assume that they agree, as MergeKit does.
    """
    vocabularies = []
    for model in (first, second):
        vocabulary = load_vocabulary(model, cache_dir, trust_remote_code)
        if vocabulary is None:
            return True
        vocabularies.append(vocabulary)
    return first_difference(*vocabularies) is None
