"""The models side by side: whether they are fine-tunes of one base, and compute alike.

The output gets the config.json of the base, so it computes as the base does. Equal shapes do not
show that an expert was trained to compute otherwise.
"""

import os
import re
import textwrap
from collections.abc import Iterator
from os.path import isfile
from typing import Any

from mergekit.common import ModelReference

from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.preflight.case import Case

# Parts of the names of settings that change what a model computes, but no shape.
_COMPUTES = re.compile(
    "rope|rotary|hidden_act|activation|_eps|window|softcap|scal|multiplier|per_tok|topk|layer_types"
    "|parallel_residual|clip_qkv|alibi|position_embedding_type|causal"
)


def unusable(case: Case) -> Iterator[str]:
    """Find what is wrong with each model alone."""
    for files in case.models.values():
        yield from files.problems
        yield from bad_adapters(files, case.options)


def same_models(case: Case) -> Iterator[str]:
    """Find models that are listed under two names, which their weight files show."""
    seen: dict[frozenset[tuple[int, int]], ModelReference] = {}
    for model, files in case.models.items():
        if model.lora and not files.adapter:
            continue  # the adapter is on the hub
        paths = [path for path in (*files.weights.files, files.adapter or "") if isfile(path)]
        stats = frozenset((it.st_dev, it.st_ino) for it in map(os.stat, paths))
        first = seen.setdefault(stats, model) if stats else model
        if first is not model:
            role = "the base" if first == case.base else "model"
            yield (
                f"Model {model} is {role} {first} under another name, with the same weight files; "
                "leave one of them out, or use one name for both."
            )


def different_heads(case: Case) -> Iterator[str]:
    """Find models whose attention is split otherwise than that of the base, or of the first."""
    for files, first in _beside_first(case):
        expected = _heads(first)
        for key, value in _heads(files).items():
            if value != expected.get(key, value):
                yield (
                    f"The config.json of model {files.model} says {key}: {value}, but that of "
                    f"{first.model} says {expected[key]}, so that tensors of one shape mean "
                    "different things; merge fine-tunes of one base."
                )
                break  # the others mostly follow from it


def different_settings(case: Case) -> Iterator[str]:
    """Find models that compute otherwise than the base, or the first, with weights of one shape."""
    for files, first in _beside_first(case):
        own, others = dict(_settings(_text(files))), dict(_settings(_text(first)))
        differ = [
            f"{key} ({_short(own, key)}, not {_short(others, key)})"
            for key in sorted(own.keys() | others.keys())
            if own.get(key) != others.get(key)
        ]
        if differ:
            whose = f", that of {first.model}" if first.model == case.base else ""
            yield (
                f"The config.json of model {files.model} differs from that of {first.model} in "
                f"{', '.join(differ)}, so that the two compute otherwise, but a merge has only one "
                f"config.json{whose}; test the result."
            )


def _beside_first(case: Case) -> Iterator[tuple[ModelFiles, ModelFiles]]:
    """Yield each model beside the base, or beside the first, if both are of one architecture."""
    known = [files for files in case.models.values() if files.config]
    for files in known[1:]:
        if files.architecture == known[0].architecture:
            yield files, known[0]


def _text(files: ModelFiles) -> dict[str, Any]:
    """Return what config.json says of the language model."""
    # Of some models, attributes of the config itself differ by layer and raise.
    return files.config.get_text_config().to_dict() if files.config else {}


def _heads(files: ModelFiles) -> dict[str, int]:
    said = _text(files)
    names: dict[str, str] = getattr(type(files.config), "attribute_map", {})  # such as n_head
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    heads, shared, width, size = (said.get(key, said.get(names.get(key, key))) for key in keys)
    if not (isinstance(heads, int) and heads > 0):
        return {}
    width = width or (size or 0) // heads
    return {"num_attention_heads": heads, "num_key_value_heads": shared or heads, "head_dim": width}


def _settings(said: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings that change what a model computes; those within others with a dot."""
    for key, value in said.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _settings(value, f"{name}.")
        elif _COMPUTES.search(name) and value is not None:
            yield name, value


def _short(settings: dict[str, Any], key: str) -> str:
    return textwrap.shorten(str(settings.get(key, "unset")), 60)
