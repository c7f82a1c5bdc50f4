"""Tokenizers: whether a token id means the same to all models."""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr

import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import TokenizerConfig

from mergekit_metagpt.preflight.planned import MergePlan
from mergekit_metagpt.preflight.tensors import TOKENIZER_WAY
from mergekit_metagpt.preflight.wording import PreflightError, reason


def different_tokenizers(
    plan: MergePlan,
    base: ModelReference | None,
    options: MergeOptions,
    file: str,
) -> Iterator[str]:
    """Find tokens that share an id; models without a tokenizer are taken to agree."""
    merged = [t for t in plan.tensors if t.task.output_weight.vocabulary_axis is not None]
    if not merged or merged[0].vocabulary_is_aligned:
        return
    models = sorted(merged[0].loads, key=lambda model: (model != base, str(model)))
    known: list[tuple[ModelReference, dict[int, str]]] = []
    for model in models:
        tokens = _tokens(model, options)
        if not tokens:
            continue
        known.append((model, tokens))
        first, expected = known[0]
        for id_, token in sorted(tokens.items()):
            if expected.get(id_, token) != token:
                yield (
                    f"Token {id_} is {token!r} to the tokenizer of model {model} but "
                    f"{expected[id_]!r} to that of {first}, so that the rows of "
                    f"{merged[0].name} mean different things; {TOKENIZER_WAY.format(file=file)}."
                )
                break


def _tokens(model: ModelReference, options: MergeOptions) -> dict[int, str] | None:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            trust_remote_code=options.trust_remote_code,
        )
        return {id_: token for token, id_ in tokenizer.get_vocab().items()}
    except Exception:  # transformers raises whatever its many loaders raise
        return None


def output_rows(plan: MergePlan, config: TokenizerConfig | None, file: str) -> int | None:
    """Return the rows of the output's vocabulary tensors; None if they stay as they are.

    Raises:
        PreflightError: if MergeKit cannot build the tokenizer that the config asks for.
    """
    if plan.tokenizer is None:
        return None
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
            tokenizer = plan.tokenizer.execute().tokenizer
    except Exception as error:  # of any of the many tokenizers
        raise PreflightError(
            f"MergeKit cannot build the tokenizer that {file} asks for ({reason(error)}); add the "
            "files of that tokenizer to the model, or leave the setting out."
        ) from error
    rows = len(tokenizer.get_vocab())
    multiple = (config.pad_to_multiple_of if config else None) or 1
    return -(-rows // multiple) * multiple
