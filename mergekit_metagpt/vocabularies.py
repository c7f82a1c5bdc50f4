"""Whether the rows of two models' vocabulary tensors stand for the same tokens."""

import logging
from functools import lru_cache

import transformers
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

LOG = logging.getLogger(__name__)


class DifferentVocabularyError(Exception):
    """Rows of a vocabulary tensor stand for different tokens in base and expert."""


def compare_vocabularies(
    weight: WeightInfo, base: tuple[ModelReference, Tensor], expert: tuple[ModelReference, Tensor]
) -> None:
    """Compare one vocabulary tensor of the base and of an expert, and their tokenizers.

    Raises:
        DifferentVocabularyError: if their rows cannot be subtracted; says why.
    """
    (origin, rows), (model, others) = base, expert
    if others.shape != rows.shape:
        raise DifferentVocabularyError(
            f"Vocabulary tensor {weight.name} has shape {list(others.shape)} in {model} but "
            f"{list(rows.shape)} in {origin}"
        )
    if not tokenizers_agree(origin, model, LoaderCache().trust_remote_code):
        raise DifferentVocabularyError(
            f"The tokenizers of {model} and {origin} give the rows of {weight.name} "
            "different meanings"
        )


@lru_cache(maxsize=256)
def tokenizers_agree(first: ModelReference, second: ModelReference, trust: bool) -> bool:
    """Return whether no token id means two things; like MergeKit, assume so without tokenizers."""
    vocabularies = []
    for model in (first, second):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                model.model.path, revision=model.model.revision, trust_remote_code=trust
            )
        except Exception as error:  # transformers raises whatever its many loaders raise
            LOG.info("No tokenizer could be loaded for %s: %s", model, error)
            return True
        vocabularies.append({id_: token for token, id_ in tokenizer.get_vocab().items()})
    return all(vocabularies[1].get(id_, token) == token for id_, token in vocabularies[0].items())
