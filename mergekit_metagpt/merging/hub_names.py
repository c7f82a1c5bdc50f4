"""Names of models on the hub, which stand for paths of this machine in what is published."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_metagpt.measure.identity import on_hub
from mergekit_metagpt.wording import BadInputError, instead

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def hub_names(config: Any, given: Sequence[str]) -> dict[str, str]:
    """Return names by path: those that are given, and those of snapshots in the hub's cache.

    Args:
        config: the raw merge config.
        given: PATH=HUB/NAME, each.

    Raises:
        BadInputError: if a path is not in the config, or a name is none of the hub.
    """
    paths = set(_paths(config))
    names = {path: "@".join(cached) for path in paths if (cached := on_hub(path))}
    for pair in given:
        path, _, name = pair.rpartition("=")
        if path not in paths:
            local = [path for path in paths if "/" in path]
            raise BadInputError(f"{pair} names no path of the config; {instead(path, local)}.")
        if not HUB_NAME.fullmatch(name):
            raise BadInputError(f"{pair} gives no name of the hub; write {path}=USER/NAME.")
        if name in names.values():
            raise BadInputError(f"{pair} gives two models one name; write each model's own.")
        names[path] = name
    return names


def named(value: Any, names: Mapping[str, str]) -> Any:
    """Return JSON or YAML types with the names of models in place of their paths.

    >>> named({"model": "./a+/b", "layer_range": [0, 2]}, {"/b": "org/b"})
    {'model': './a+org/b', 'layer_range': [0, 2]}
    """
    if isinstance(value, dict):
        return {key: named(child, names) for key, child in value.items()}
    if isinstance(value, list):
        return [named(child, names) for child in value]
    if isinstance(value, str):  # as in MergeKit: path, path@revision or path+lora
        parts = (part.partition("@") for part in value.split("+"))
        return "+".join(names.get(path, path) + at + revision for path, at, revision in parts)
    return value


def _paths(value: Any) -> Iterator[str]:
    """Yield every text in a raw config that may be the path of a model."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _paths(child)
    elif isinstance(value, str):
        yield from (part.partition("@")[0] for part in value.split("+"))
