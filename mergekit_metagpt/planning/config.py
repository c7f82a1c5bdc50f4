"""Reads merge configs, and walks through them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import click
import yaml
from mergekit.common import ModelReference
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.names import canonical
from mergekit_metagpt.wording import BadInputError, reason

# The keys of a config under which MergeKit reads mappings into classes of its own.
_CHILDREN: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
    "modules": OutputModuleDefinition,
    "tokenizer": TokenizerConfig,
}

# Far above any real config: its characters, and the values that its aliases repeat.
_LONGEST_TEXT, _MOST_REPEATED = 1 << 27, 1_000_000

# The module of a config, and the number of the slice in it.
Place = tuple[str, int]


@dataclass(frozen=True)
class ConfigFile:
    """A merge config as it was written.

    Attributes:
        name: the path of its file, for messages.
        text: the contents of the file.
        raw: the same as Python objects.
    """

    name: str
    text: str
    raw: dict[str, Any]

    @property
    def anchored(self) -> set[str]:
        """The top-level keys under which a YAML anchor is defined, to be used elsewhere."""
        blocks = re.split(r"^(?=\S)", self.text, flags=re.MULTILINE)
        return {b.partition(":")[0].strip("'\" ") for b in blocks if re.search(r"[\s\[{,]&\w", b)}

    def parse(self) -> MergeConfiguration:
        """Return the config as MergeKit reads it.

        Raises:
            BadInputError: with a sentence for each value that MergeKit cannot read.
        """
        try:
            return MergeConfiguration.model_validate(self.raw)
        except ValidationError as error:
            raise BadInputError(*_complaints(error, self)) from None
        except (RuntimeError, TypeError) as error:
            said = str(error).rstrip(".")
            raise BadInputError(f"{self.name} is wrong: {said}; correct it.") from None


def read_config(file: str) -> ConfigFile:
    """Return the config that a file holds; ``-`` is standard input.

    The file may be a pipe, which can be read only once. So pass on the result, and never read the
    file again.

    Raises:
        BadInputError: if it cannot be read, is not a mapping, or is too large.
    """
    try:
        with click.open_file(file, encoding="utf-8") as stream:
            text = stream.read(_LONGEST_TEXT)
        if len(text) == _LONGEST_TEXT:
            raise OSError("it does not end")
        raw = yaml.load(text, _BoundedLoader)
    except FileNotFoundError:
        raise BadInputError(f"Merge config {file} does not exist; correct its path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"Merge config {file} cannot be read ({reason(error)}); name a YAML file."
        ) from None
    except _BoundedLoader.TooLargeError:
        raise BadInputError(
            f"Merge config {file} repeats values by aliases more than {_MOST_REPEATED:,} times; "
            "write it with fewer aliases."
        ) from None
    except yaml.composer.ComposerError:
        raise BadInputError(
            f"Merge config {file} holds several merges, one after another; split it, or run it "
            "with mergekit-multi."
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise BadInputError(f"Merge config {file} is not YAML ({where}); correct it.") from None
    if not isinstance(raw, dict):
        raise BadInputError(
            f"Merge config {file} is not a mapping of keys to values; start from one of "
            "example_configs."
        )
    return ConfigFile(file, text, raw)


class _BoundedLoader(yaml.SafeLoader):
    """Refuses a config whose nested aliases expand to more values than fit into memory."""

    class TooLargeError(Exception):
        """There are too many values."""

    def construct_document(self, node: yaml.Node) -> Any:
        # Without aliases, a text holds at most as many values as characters.
        if _values(node, {}) > _MOST_REPEATED + self.index:
            raise self.TooLargeError
        return super().construct_document(node)


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Count a node and the values below it; an alias counts each time that it is used."""
    if node not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[node] = 1 + sum(_values(child, known) for child in children)
    return known[node]


def _complaints(error: ValidationError, config: ConfigFile) -> list[str]:
    places: dict[tuple[int | str, ...], str] = {}
    for found in error.errors():
        place = _existing(config.raw, found["loc"])
        if found["type"] == "missing":
            sentence = f"{config.name} lacks {_written(place, found['loc'][-1])}; add it."
        else:
            said = found["msg"][:1].lower() + found["msg"][1:]
            sentence = f"{config.name} is wrong at {_written(place)}: {said}; correct it."
        places.setdefault(place, sentence)  # of the complaints about a union, only the first
    return list(places.values())


def _existing(raw: Any, path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the part of a pydantic location that the config has, without names of types."""
    for depth, key in enumerate(path):
        try:
            raw = raw[key]
        except (KeyError, IndexError, TypeError):
            return path[:depth]
    return path


def _written(path: tuple[int | str, ...], *last: int | str) -> str:
    keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in (*path, *last))
    return "".join(keys).lstrip(".")


@dataclass(frozen=True)
class Level:
    """A mapping in a raw config that MergeKit reads into a class of its own."""

    path: str
    values: dict[Any, Any]
    schema: type[BaseModel]

    @property
    def at(self) -> str:
        """The place in words, with the model that it is about."""
        model = f" ({self.values['model']})" if "model" in self.values else ""
        return f" at {self.path}{model}" if self.path else ""

    @property
    def is_input(self) -> bool:
        """Whether it is about one model."""
        return self.schema in (InputModelDefinition, InputSliceDefinition)


def levels(
    values: dict[Any, Any], schema: type[BaseModel] = MergeConfiguration, path: str = ""
) -> Iterator[Level]:
    """Yield a raw config and all levels within it, whether MergeKit can read them or not."""
    yield Level(path, values, schema)
    for key in _CHILDREN.keys() & schema.model_fields.keys():
        for index, member in _members(key, values.get(key)):
            if isinstance(member, dict):
                yield from levels(member, _CHILDREN[key], f"{path}.{key}{index}".lstrip("."))


def _members(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"[{number}]", member) for number, member in enumerate(value)]
    if isinstance(value, dict) and key == "modules":
        return [(f".{name}", member) for name, member in value.items()]
    return [("", value)]


@dataclass(frozen=True)
class Part:
    """A list of models that a config merges with each other.

    Attributes:
        path: where it is, such as ``slices[0]``.
        place: the module (empty outside of modules), and the number of the slice.
        holder: the object with the list: a slice, or a config or module without slices.
        base: θ_0 there, if there is one.
    """

    path: str
    place: Place
    holder: MergeConfiguration | OutputModuleDefinition | OutputSliceDefinition
    base: ModelReference | None

    @property
    def inputs(self) -> list[InputModelDefinition] | list[InputSliceDefinition]:
        """The entries of the list."""
        if isinstance(self.holder, OutputSliceDefinition):
            return self.holder.sources
        return self.holder.models or []

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The models as they are listed."""
        return tuple(entry.model for entry in self.inputs)

    @property
    def is_slice(self) -> bool:
        """Whether the list belongs to a slice."""
        return isinstance(self.holder, OutputSliceDefinition)

    def replace_inputs(self, inputs: list[Any]) -> None:
        """Replace the entries of the list in the config."""
        setattr(self.holder, "sources" if self.is_slice else "models", inputs)


def parts(config: MergeConfiguration) -> Iterator[Part]:
    """Yield the parts of a config and of its modules."""
    holders: dict[str, MergeConfiguration | OutputModuleDefinition] = {"": config}
    holders |= config.modules or {}
    for module, holder in holders.items():
        prefix = f"modules.{module}." if module else ""
        if holder.models:
            yield Part(f"{prefix}models", (module, 0), holder, config.base_model)
        slices = cast("list[OutputSliceDefinition]", holder.slices or [])
        for number, piece in enumerate(slices):
            base = piece.base_model or config.base_model
            yield Part(f"{prefix}slices[{number}]", (module, number), piece, base)


def base_and_experts(config: MergeConfiguration) -> tuple[ModelReference, list[ModelReference]]:
    """Return the base and the experts of a config, in canonical order.

    Raises:
        BadInputError: if there is not one base, or no expert.
    """
    named = {config.base_model, *(part.base for part in parts(config))}
    bases = {base for base in named if base is not None}
    if len(bases) != 1:
        raise BadInputError(
            "Task vectors start at one base, but the merge config names "
            f"{'several' if bases else 'none'}; set base_model."
        )
    base = next(iter(bases))
    experts = canonical(set(config.referenced_models()) - {base})
    if not experts:
        raise BadInputError("The merge config names no model beside the base; add the experts.")
    return base, experts


def parameter_sets(config: MergeConfiguration) -> Iterator[dict[str, Any]]:
    """Yield every ``parameters`` mapping of a config, the innermost first."""
    found = list(parts(config))
    holders: list[Any] = [entry for part in found for entry in part.inputs]
    holders += [part.holder for part in found if part.is_slice]
    for holder in [*holders, *(config.modules or {}).values(), config]:
        if holder.parameters is not None:
            yield holder.parameters
