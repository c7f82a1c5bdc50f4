"""Names of models on the hub, which stand for paths of this machine in what is published."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_metagpt.measure.identity import on_hub
from mergekit_metagpt.wording import BadInputError, instead

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# The keys of configs and records whose text is a model: path, path@revision or path+lora.
_MODEL_KEYS = {"model", "base_model", "base", "lora", "path", "source", "tokenizer_source"}
_NO_MODELS = {"union", "base"}  # as the source of a tokenizer


def hub_names(config: Any, given: Sequence[str]) -> dict[str, str]:
    """Return names by path: those that are given, and those of snapshots in the hub's cache.

    ``config`` is raw, and what is given is PATH=USER/NAME, each.
    """
    paths = set(_paths(config))
    names = {path: "@".join(cached) for path in paths if (cached := on_hub(path))}
    for pair in given:
        path, _, name = pair.rpartition("=")
        if path not in paths:
            raise BadInputError(f"{pair} names no path of the config; {instead(path, paths)}.")
        if not HUB_NAME.fullmatch(name):
            raise BadInputError(f"{pair} gives no name of the hub; write {path}=USER/NAME.")
        if name in names.values():
            raise BadInputError(f"{pair} gives two models one name; write each model's own.")
        names[path] = name
    return names


def named(value: Any, names: Mapping[str, str], key: str = "") -> Any:
    """Return JSON or YAML types, found under a key, with names of models in place of their paths.

    >>> named({"model": "./a+/b", "layer_range": [0, 2]}, {"/b": "org/b"})
    {'model': './a+org/b', 'layer_range': [0, 2]}
    """
    if isinstance(value, dict):
        return {key: named(child, names, key) for key, child in value.items()}
    if isinstance(value, list):
        return [named(child, names, key) for child in value]
    if _is_model(value, key):
        return "+".join(names.get(path, path) + rest for path, rest in _parts(value))
    return value


def _paths(value: Any, key: str = "") -> Iterator[str]:
    """Yield the path of every model and adapter in a raw config."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _paths(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _paths(child, key)
    elif _is_model(value, key):
        yield from (path for path, _ in _parts(value))


def _is_model(value: Any, key: str) -> bool:
    if not isinstance(value, str) or key not in _MODEL_KEYS:
        return False
    return value not in _NO_MODELS or not key.endswith("source")


def _parts(model: str) -> list[tuple[str, str]]:
    """Return the paths of a model and its adapter, each with the rest of its text."""
    parts = (part.partition("@") for part in model.split("+"))
    return [(path, at + revision) for path, at, revision in parts]
