"""The texts that a model is probed with, as token ids."""

from pathlib import Path

import torch
import transformers
from mergekit.common import ModelReference
from torch import Tensor

#: One per line in a file of the user's own.
BUILT_IN = (
    "The capital of France is the city of Paris, which lies on the river",
    "Water boils at a lower temperature in the mountains because the air pressure",
    "She opened the letter slowly, read the first line, and began to",
    "A train leaves at nine and arrives at noon. The journey takes three",
    "If x + 3 = 10, then x is equal to",
    "def add(a, b):\n    return a",
    "Question: Which planet is closest to the sun? Answer:",
    "To make tea, heat the water, pour it over the leaves, and wait a few",
)

_RANDOM_PROMPTS, _RANDOM_LENGTH = 8, 16

# What a prompt is cut to: a long document would cost minutes and add little.
_LONGEST = 256


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank.

    Raises:
        ValueError: if the file is not UTF-8 or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one prompt per line.")
    return prompts


def tokenize(
    prompts: list[str], base: ModelReference, trust_remote_code: bool, cache: str | None
) -> list[Tensor] | None:
    """Return each prompt's token ids, int64 of shape [L], or None if the base has no tokenizer."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            base.model.path,
            revision=base.model.revision,
            trust_remote_code=trust_remote_code,
            cache_dir=cache,
        )
    except Exception:  # transformers raises whatever its many loaders raise
        return None
    ids = [torch.tensor(tokenizer(prompt)["input_ids"][:_LONGEST]) for prompt in prompts]
    return [row.long() for row in ids if len(row)]


def random_prompts(vocabulary: int, seed: int) -> list[Tensor]:
    """Return token ids drawn from [0, vocabulary), int64 of shape [16] each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (_RANDOM_PROMPTS, _RANDOM_LENGTH), generator=generator)
    return list(ids)
