"""Reads merge configs, walks through their parts, and turns them into what YAML can hold."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import click
import numpy as np
import torch
import yaml
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration, OutputModuleDefinition, OutputSliceDefinition
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.names import canonical
from mergekit_metagpt.wording import BadInputError, nearest, reason


@dataclass(frozen=True)
class ConfigFile:
    """A merge config as it was written."""

    name: str  # the path of its file, for messages
    text: str  # the contents of the file
    raw: dict[str, Any]  # the same as Python objects

    def __str__(self) -> str:
        return self.name

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
            return OrderedConfig.model_validate(self.raw)
        except ValidationError as error:
            said = {_place(each, self.raw): each["msg"] for each in error.errors()}
            # What is wrong inside a value says more than that the value is wrong.
            inner = [at for at in said if not any(at != it and is_within(it, at) for it in said)]
            raise BadInputError(
                *(f"{self.name} is wrong at {at}: {said[at]}; correct it." for at in inner)
            ) from None
        except (RuntimeError, TypeError) as error:
            raise BadInputError(f"{self.name} is wrong: {reason(error)}; correct it.") from None


def _place(error: Mapping[str, Any], value: Any) -> str:
    """Return where pydantic found an error, without the names of the types that it tried."""
    place, keys = "", list(error["loc"])
    for key in keys:
        known = range(len(value)) if isinstance(value, list) else value
        if isinstance(known, dict | range) and key in known:
            place += f"[{key}]" if isinstance(key, int) else f".{key}"
            value = value[key]
    if error["type"] == "missing":
        named = value if isinstance(value, dict) else ()
        close = nearest(keys[-1], [key for key in named if isinstance(key, str)])
        place += f".{keys[-1]}{f' (it has {close})' if close else ''}"
    return place.lstrip(".")


def is_within(inner: str, outer: str) -> bool:
    """Return whether a place in a config is another one, or is inside it.

    >>> is_within("slices[1].sources[0]", "slices[1]"), is_within("slices[11]", "slices[1]")
    (True, False)
    """
    return inner == outer or not outer or inner.startswith((f"{outer}.", f"{outer}["))


def read_config(file: str) -> ConfigFile:
    """Return the config that a file, or a pipe, holds; ``-`` is standard input.

    Pass on the result, since a pipe can be read only once.

    Raises:
        BadInputError: if it cannot be read, or is not one YAML document in UTF-8, a mapping in
            which every key is set once.
    """
    try:
        with click.open_file(file, "rb") as stream:
            text = re.sub("\r\n?", "\n", stream.read().decode("utf-8-sig"))
        raw = yaml.load(text, _StrictLoader)
        if isinstance(raw, dict):
            return ConfigFile(file, text, raw)
        fault = "is not a mapping of keys to values; start from one of example_configs"
    except OSError as error:
        fault = f"cannot be read ({error.strerror}); name a YAML file"
    except UnicodeDecodeError as error:
        at = f"{error.reason}, at byte {error.start + 1}"
        fault = f"is not in UTF-8 ({at}); save it as UTF-8"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "its text"
        said = " ".join(filter(None, (error.context, error.problem)))
        fault = f"is not YAML in {where} ({said}); correct it"
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of characters, dates, nesting
        fault = f"is not YAML ({reason(error)}); correct it"
    raise BadInputError(f"Merge config {file} {fault}.")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is set twice, of which PyYAML would forget the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                first = known.setdefault((key.tag, key.value), key)
                if first is not key:
                    line = first.start_mark.line + 1
                    said = f"{key.value} is set twice, first in line {line}"
                    raise yaml.MarkedYAMLError(problem=said, problem_mark=key.start_mark)
        return node


def reference(model: str | os.PathLike[str] | ModelReference) -> ModelReference:
    """Return the model that is named outside of a config: by any path that exists, or as there.

    Raises:
        BadInputError: if it can be neither.
    """
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    if isinstance(model, str) and os.path.exists(model):
        return ModelReference(model=ModelPath(path=model))
    try:
        return ModelReference.model_validate(model)
    except RuntimeError:
        raise BadInputError(
            f"Model {model} does not exist, and is no MODEL@REVISION+ADAPTER either; correct it."
        ) from None


@dataclass(frozen=True)
class Part:
    """A list of models that a config merges with each other."""

    path: str  # where it is, such as slices[0]
    module: str  # that it is in; empty outside of modules
    number: int | None  # of the slice; None if it is none
    # What has the list: a slice, or a config or module without slices.
    holder: MergeConfiguration | OutputModuleDefinition | OutputSliceDefinition
    inputs: list[Any]  # the entries of the list itself
    base: ModelReference | None  # θ_0 there

    def holds(self, module: str, number: int) -> bool:
        """Return whether the models are merged in a slice of a module.

        MergeKit's planner puts tensors in modules even if the config has none. A part without a
        module therefore matches every module.
        """
        return self.module in ("", module) and self.number in (None, number)


def parts(config: MergeConfiguration) -> Iterator[Part]:
    """Yield the parts of a config and of its modules."""
    holders: dict[str, MergeConfiguration | OutputModuleDefinition] = {"": config}
    holders |= config.modules or {}
    for module, holder in holders.items():
        prefix = f"modules.{module}." if module else ""
        if holder.models:
            yield Part(f"{prefix}models", module, None, holder, holder.models, config.base_model)
        for number, piece in enumerate(holder.slices or []):
            base = piece.base_model or config.base_model
            path = f"{prefix}slices[{number}]"
            yield Part(path, module, number, piece, piece.sources, base)


def base_and_experts(config: MergeConfiguration) -> tuple[ModelReference, list[ModelReference]]:
    """Return the base and the experts of a config, in canonical order.

    Raises:
        BadInputError: if there is not one base, or no expert.
    """
    bases = {config.base_model, *(part.base for part in parts(config))} - {None}
    if len(bases) != 1:
        raise BadInputError(
            "Task vectors start at one base, but the merge config names "
            f"{'several' if bases else 'none'}; set base_model."
        )
    (base,) = bases
    assert base is not None
    experts = canonical(set(config.referenced_models()) - {base})
    if not experts:
        raise BadInputError("The merge config names no model beside the base; add the experts.")
    return base, experts


def parameter_sets(config: MergeConfiguration) -> list[dict[str, Any]]:
    """Return every ``parameters`` mapping of a config; some of them twice."""
    holders: list[Any] = [config, *(config.modules or {}).values()]
    for part in parts(config):
        holders += [part.holder, *part.inputs]
    return [holder.parameters for holder in holders if holder.parameters is not None]


class OrderedConfig(MergeConfiguration):
    """A config whose models have an order; MergeKit's is that of a set.

    The order decides which of equally frequent templates ``chat_template: auto`` takes.
    """

    def referenced_models(self) -> list[ModelReference]:
        """Return the base, then the other models as they are listed."""
        listed = [entry.model for part in parts(self) for entry in part.inputs]
        return list(dict.fromkeys([self.base_model, *listed] if self.base_model else listed))


def plain(value: Any) -> Any:
    """Return a config, or a part of one, as types that YAML holds, without MergeKit's defaults.

    MergeKit's own serializer fails for a model path that contains a space. If the path contains
    a + or @, the text that it writes is read back as a different model.

    Raises:
        BadInputError: if it holds something that no config can.

    >>> plain({"weight": np.float32(0.5), "layer_range": (0, 2), "dtype": torch.bfloat16})
    {'weight': 0.5, 'layer_range': [0, 2], 'dtype': 'bfloat16'}
    """
    if isinstance(value, ModelReference) and _reads_back(value):
        return str(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        value = {n: its for n, field in fields if (its := getattr(value, n)) != field.default}
    if isinstance(value, Mapping):
        if isinstance(path := value.get("path"), os.PathLike):
            value = {**value, "path": os.fspath(path)}
        return {plain(key): plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return plain(value.tolist())  # of numpy and torch, the only way to Python's own numbers
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return plain(ModelReference(model=ModelPath(path=os.fspath(value))))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    for kind in (bool, str, int, float):  # subclasses of these, too
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise BadInputError(
        f"The config holds {value!r} of type {type(value).__name__}, which no merge config can; "
        "write it as text, a number, a list or a mapping."
    )


def _reads_back(model: ModelReference) -> bool:
    try:
        return bool(ModelReference.model_validate(str(model)) == model)
    except RuntimeError:  # more than one + or @
        return False
