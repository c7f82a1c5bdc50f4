"""Names of models on the hub, which stand for paths of this machine in what is published."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from mergekit_metagpt.measure.identity import on_hub
from mergekit_metagpt.wording import BadInputError, instead

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# The keys of configs and records whose text is a model: path, path@revision or path+lora.
_MODEL_KEYS = {"model", "base_model", "base", "lora", "path", "source", "tokenizer_source"}
_NO_MODELS = {"union", "base"}  # as the source of a tokenizer


def hub_names(config: Any, given: Sequence[str]) -> dict[str, str]:
    """Return names by path of a raw config: given as PATH=USER/NAME, or of the hub's cache."""
    paths: dict[str, str] = {}
    renamed(config, lambda path: paths.setdefault(path, path))
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


def renamed(value: Any, name_of: Callable[[str], str], key: str = "") -> Any:
    """Return JSON or YAML types, found under a key, with other names for the paths of models."""
    if isinstance(value, dict):
        return {key: renamed(child, name_of, key) for key, child in value.items()}
    if isinstance(value, list):
        return [renamed(child, name_of, key) for child in value]
    is_word = str(key).endswith("source") and value in _NO_MODELS
    if key not in _MODEL_KEYS or not isinstance(value, str) or is_word:
        return value
    return re.sub(r"(^|\+)([^@+]+)", lambda found: found[1] + name_of(found[2]), value)
