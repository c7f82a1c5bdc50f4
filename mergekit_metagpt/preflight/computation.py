"""What config.json says of how a model computes: equal shapes do not show it.

The output gets the config of the base, so it computes as the base does.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from mergekit.common import ModelReference

from mergekit_metagpt.planning.models import ModelFiles

# Parts of the names of settings that change what a model computes, but no shape.
_COMPUTES = re.compile(
    "rope|rotary|hidden_act|activation|_eps|window|softcap|scal|multiplier|per_tok|topk|layer_types"
    "|parallel_residual|clip_qkv|alibi|position_embedding_type|causal"
)


def different_heads(base: ModelReference | None, models: Sequence[ModelFiles]) -> Iterator[str]:
    """Find models whose attention is split otherwise than that of the base, or of the first."""
    for files, first in _beside_first(base, models):
        for key, value in _heads(files).items():
            expected = _heads(first).get(key)
            if expected is not None and value != expected:
                yield (
                    f"The config.json of model {files.model} says {key}: {value}, but that of "
                    f"{first.model} says {expected}, so that tensors of one shape mean different "
                    "things; merge fine-tunes of one base."
                )
                break  # the others mostly follow from it


def different_settings(base: ModelReference | None, models: Sequence[ModelFiles]) -> Iterator[str]:
    """Find models that compute otherwise than the base, or the first, with weights of one shape."""
    for files, first in _beside_first(base, models):
        own, others = _settings(files), _settings(first)
        differ = sorted(
            key for key in own.keys() | others.keys() if own.get(key) != others.get(key)
        )
        if differ:
            said = [f"{key} ({_short(own, key)}, not {_short(others, key)})" for key in differ]
            whose = f", that of {first.model}" if first.model == base else ""
            yield (
                f"The config.json of model {files.model} differs from that of {first.model} in "
                f"{', '.join(said)}, so that the two compute otherwise, but a merge has only one "
                f"config.json{whose}; test the result."
            )


def _short(settings: dict[str, Any], key: str) -> str:
    return textwrap.shorten(str(settings.get(key, "unset")), 60)


def _beside_first(
    base: ModelReference | None, models: Sequence[ModelFiles]
) -> Iterator[tuple[ModelFiles, ModelFiles]]:
    """Yield each model of the first one's architecture, and the first, which is the base."""
    known = [files for files in models if files.config]
    known.sort(key=lambda files: (files.model != base, str(files.model)))
    for files in known[1:]:
        if files.architecture == known[0].architecture:
            yield files, known[0]


def _text(files: ModelFiles) -> Any:
    return files.config.get_text_config() if files.config else None


def _heads(files: ModelFiles) -> dict[str, int]:
    said = _text(files).to_dict()  # of some models, attributes differ by layer and raise
    heads = said.get("num_attention_heads")
    if not isinstance(heads, int):
        return {}
    width = said.get("head_dim") or said.get("hidden_size", 0) // heads
    shared = said.get("num_key_value_heads") or heads
    return {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": width}


def _settings(files: ModelFiles) -> dict[str, Any]:
    """Return the settings that change what a model computes; those within others with a dot."""
    return {
        key: value
        for key, value in _flat(_text(files).to_dict(), "")
        if _COMPUTES.search(key) and value is not None
    }


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
