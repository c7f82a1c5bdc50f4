"""Names of models on the hub, which stand for paths of this machine in what is published."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from mergekit.common import ModelReference

from mergekit_metagpt.method.summary import Entry
from mergekit_metagpt.wording import BadInputError, instead

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# A snapshot in the hub's cache, which is named after its repository; "--" is in no name.
_CACHED = re.compile(r"(?:^|/)models--([^/]+)/snapshots/([0-9a-f]{40})/?$")


def hub_names(config: Any, given: Sequence[str]) -> dict[str, str]:
    """Return names by path: those that are given, and those of snapshots in the hub's cache.

    Args:
        config: the raw merge config.
        given: PATH=HUB/NAME, each.

    Raises:
        BadInputError: if a path is not in the config, or a name is none of the hub.
    """
    paths = set(_paths(config))
    names = {
        path: f"{found[1].replace('--', '/')}@{found[2]}"
        for path in paths
        if (found := _CACHED.search(path))
    }
    for pair in given:
        path, _, name = pair.rpartition("=")
        if path not in paths:
            local = [path for path in paths if "/" in path]
            raise BadInputError(f"{pair} names no path of the config; {instead(path, local)}.")
        if not HUB_NAME.fullmatch(name):
            raise BadInputError(f"{pair} gives no name of the hub; write {path}=USER/NAME.")
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


def named_source(source: str, names: Mapping[str, str]) -> str:
    """Return a config's YAML with names in place of paths, also in its comments.

    If the text cannot be edited safely, it is written anew, without comments.

    >>> named_source("base_model: /m/a  # not /m/ab\\n", {"/m/a": "org/a"})
    'base_model: org/a  # not /m/ab\\n'
    """
    text = source
    for path in sorted(names, key=len, reverse=True):
        whole = rf"(?<![\w./~-]){re.escape(path)}(?![\w-]|[./][\w.])"
        text = re.sub(whole, lambda _, name=names[path]: name, text)  # type: ignore[misc]
    wanted = named(yaml.safe_load(source), names)
    if yaml.safe_load(text) != wanted:
        text = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return text


def named_entries(entries: Iterable[Entry], names: Mapping[str, str]) -> list[Entry]:
    """Return what a merge noted, with the names of its experts in place of their paths."""
    return [
        replace(
            entry,
            experts=tuple(
                ModelReference.model_validate(named(str(expert), names)) for expert in entry.experts
            ),
        )
        for entry in entries
    ]


def _paths(value: Any) -> Iterator[str]:
    """Yield every text in a raw config that may be the path of a model."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _paths(child)
    elif isinstance(value, str):
        yield from (part.partition("@")[0] for part in value.split("+"))
