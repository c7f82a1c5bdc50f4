"""Walks through a raw config, whether MergeKit can read it or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel

# The keys of a config that name a model.
_REFERENCES = ("model", "lora", "base_model", "source", "tokenizer_source")
# The keys under which MergeKit reads mappings into classes of its own.
_CHILDREN: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
    "modules": OutputModuleDefinition,
    "tokenizer": TokenizerConfig,
    "tokens": TokenEmbeddingConfig,
    "parameters": ConditionalParameter,
    **dict.fromkeys(_REFERENCES, ModelReference),
}


@dataclass(frozen=True)
class Level:
    """A mapping in a raw config that MergeKit reads into a class of its own."""

    path: str
    values: dict[Any, Any]
    schema: type[BaseModel]

    @property
    def at(self) -> str:
        """The place in words, with the model that it is about."""
        model = self.values.get("model")
        while isinstance(model, dict):  # {model: {path: PATH}}
            model = model.get("model", model.get("path"))
        return f" at {self.path}{f' ({model})' if model else ''}" if self.path else ""

    @property
    def is_input(self) -> bool:
        """Whether it is about one model."""
        return self.schema in (InputModelDefinition, InputSliceDefinition)


def levels(
    values: dict[Any, Any], schema: type[BaseModel] = MergeConfiguration, path: str = ""
) -> Iterator[Level]:
    """Yield a raw config and all levels within it, whether MergeKit can read them or not."""
    yield Level(path, values, schema)
    for key, child in _CHILDREN.items():
        for index, member in _members(key, values.get(key)) if key in schema.model_fields else ():
            if isinstance(member, dict):
                its = _of_reference(member, schema) if child is ModelReference else child
                yield from levels(member, its, f"{path}.{key}{index}".lstrip("."))


def _members(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is at a key, in its list, or under names of the user's; and each one's place."""
    if key in ("modules", "tokens", "parameters"):
        for name, member in value.items() if isinstance(value, dict) else ():
            inner = _members("", member) if key == "parameters" else [("", member)]
            yield from ((f".{name}{index}", each) for index, each in inner)
    elif isinstance(value, list):
        yield from ((f"[{number}]", member) for number, member in enumerate(value))
    else:
        yield "", value


def _of_reference(value: dict[Any, Any], parent: type[BaseModel]) -> type[BaseModel]:
    if parent is ModelReference:
        return ModelPath
    return ModelTokenEmbedding if "kind" in value else ModelReference


def settings(raw: dict[Any, Any]) -> Iterator[tuple[Level, str, Any]]:
    """Yield every parameter that a raw config sets, and where."""
    for level in levels(raw):
        found = level.values.get("parameters")
        for name, setting in found.items() if isinstance(found, dict) else ():
            yield level, name, setting


def is_within(inner: str, outer: str) -> bool:
    """Return whether a place in a config is another one, or is inside it.

    >>> is_within("slices[1].sources[0]", "slices[1]"), is_within("slices[11]", "slices[1]")
    (True, False)
    """
    return inner == outer or not outer or inner.startswith((f"{outer}.", f"{outer}["))
