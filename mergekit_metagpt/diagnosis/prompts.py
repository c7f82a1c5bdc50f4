"""The prompts that a model is probed with, as token ids."""

from collections.abc import Sequence
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt.measure.vocabularies import load_tokenizer

# Neutral texts of several kinds: facts, stories, sums, code, questions, instructions.
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

# Longer prompts are cut to this many tokens: a long document takes minutes and adds little.
_LONGEST = 256


def read_prompts(path: Path) -> Sequence[str]:
    """Return the lines of a UTF-8 file, without blank ones.

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


def token_ids(
    file: Path | None, base: ModelReference, vocabulary: int, options: MergeOptions
) -> tuple[list[Tensor], str]:
    """Return the prompts that a base and its experts are probed with.

    Args:
        file: one prompt per line; the built-in prompts if None.
        base: the model whose tokenizer is used.
        vocabulary: the size of the base's vocabulary.
        options: MergeKit's options. The random seed, the cache, and whether to trust remote code
            are used.

    Returns:
        The token ids, int64 of shape [L] each, and a description of them in words. Without a
        file and a tokenizer, the ids are random.

    Raises:
        ValueError: if the file is no list of prompts or needs a tokenizer that cannot be
            loaded, or if the tokenizer does not fit the model.
    """
    prompts = BUILT_IN if file is None else read_prompts(file)
    tokenizer = load_tokenizer(base, options.transformers_cache, options.trust_remote_code)
    if tokenizer is None:
        if file is not None:
            raise ValueError(
                f"No tokenizer could be loaded for {base}, but {file} needs one; add the "
                "tokenizer files, or leave out --prompts to use random token ids."
            )
        seed = options.random_seed or 0
        return _random(vocabulary, seed), (
            f"{_RANDOM_PROMPTS} prompts of random token ids (seed {seed}), since no tokenizer "
            f"could be loaded for {base}"
        )
    ids = [torch.tensor(tokenizer(prompt)["input_ids"][:_LONGEST]).long() for prompt in prompts]
    ids = [row for row in ids if len(row)]
    if not ids or max(row.max().item() for row in ids) >= vocabulary:
        raise ValueError(
            f"The tokenizer of {base} does not fit the model, which knows {vocabulary} tokens; "
            "download its tokenizer files again."
        )
    source = "built-in prompts" if file is None else f"prompts from {file}"
    return ids, f"{len(ids)} {source}"


def _random(vocabulary: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocabulary, (_RANDOM_PROMPTS, _RANDOM_LENGTH), generator=generator))
