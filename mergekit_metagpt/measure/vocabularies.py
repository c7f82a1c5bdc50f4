"""Load tokenizers, and compare what the rows of two models' vocabulary tensors mean."""

import os
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelPath, ModelReference

from mergekit_metagpt.mergekit_private import wants_remote_code
from mergekit_metagpt.wording import BadInputError, reason

# The names of files of all tokenizers of transformers.
TOKENIZER_FILES = ("tokenizer*.*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")

# A model's tokens by token id.
Vocabulary = dict[int, str]


def load_tokenizer(
    model: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> Any | None:
    """Return a model's tokenizer, or None if it has none; an adapter has that of its base.

    If there are files of a tokenizer that cannot be used, raise a BadInputError.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
        )
    except Exception as error:  # the many loaders of transformers raise many types
        if not _tokenizer_files(model.model):
            return None
        way = "download its files again, or update transformers"
        if wants_remote_code(error):
            way = "pass --trust-remote-code if you trust the code that it needs"
        raise BadInputError(
            f"The tokenizer of model {model} cannot be read ({reason(error)}); {way}."
        ) from None


def _tokenizer_files(model: ModelPath) -> list[str]:
    if os.path.isdir(model.path):
        files = os.listdir(model.path)
    else:
        try:
            files = huggingface_hub.list_repo_files(model.path, revision=model.revision)
        except HFValidationError:  # no name of a repository
            return []
        except Exception:  # of the hub's client, or of its connection: nobody knows
            return [""]
    return [file for file in files if any(fnmatch(file, name) for name in TOKENIZER_FILES)]


def load_vocabulary(
    model: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> Vocabulary | None:
    """Return a model's tokens by token id, or None if it has no tokenizer."""
    tokenizer = load_tokenizer(model, cache_dir, trust_remote_code)
    if tokenizer is None:
        return None
    return {id_: token for token, id_ in tokenizer.get_vocab().items()}


def first_difference(first: Vocabulary, second: Vocabulary) -> int | None:
    """Return the smallest id with a different token in each vocabulary, or None."""
    return next((i for i in sorted(first) if second.get(i, first[i]) != first[i]), None)


@lru_cache(maxsize=256)
def tokenizers_agree(
    first: ModelReference, second: ModelReference, cache_dir: str | None, trust_remote_code: bool
) -> bool:
    """Return whether two models agree on the token of every id that both have.

    If one of them has no tokenizer, assume that they agree, as MergeKit does.
    """
    known = load_vocabulary(first, cache_dir, trust_remote_code)
    other = known and load_vocabulary(second, cache_dir, trust_remote_code)
    return not (known and other) or first_difference(known, other) is None
