"""Reads the YAML of merge configs, and turns Python objects into what YAML can hold."""

import re
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

import click
import numpy as np
import torch
import yaml
from mergekit.common import ModelPath, ModelReference
from pydantic import BaseModel

from mergekit_metagpt.wording import BadInputError, reason

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(file: str) -> tuple[str, Any]:
    """Return the text of a file, and what it holds; ``-`` is standard input.

    Raises:
        BadInputError: if it cannot be read, or is not one YAML document in UTF-8 in which every
            key is set once.
    """
    try:
        with click.open_file(file, "rb") as stream:
            text = re.sub("\r\n?", "\n", stream.read().decode("utf-8-sig"))
        return text, yaml.load(text, _StrictLoader)
    except OSError as error:
        raise BadInputError(
            f"Merge config {file} cannot be read ({error.strerror}); name a YAML file."
        ) from None
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"Merge config {file} is not in UTF-8 ({error.reason}, at byte {error.start + 1}); "
            "save it as UTF-8."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "its text"
        said = " ".join(filter(None, (error.context, error.problem)))
        raise BadInputError(
            f"Merge config {file} is not YAML in {where} ({said}); correct it."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of characters, dates, nesting
        raise BadInputError(
            f"Merge config {file} is not YAML ({reason(error)}); correct it."
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is set twice, of which PyYAML would forget the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                first = known.setdefault((key.tag, key.value), key)
                if first is not key:
                    line = first.start_mark.line + 1
                    said = f"{key.value} is set twice, first in line {line}"
                    raise yaml.MarkedYAMLError(problem=said, problem_mark=key.start_mark)
        return node


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
        changed = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if getattr(value, name) != field.default
        }
        return plain(changed)
    if isinstance(value, Mapping):
        return {
            plain(key): fspath(member)
            if key == "path" and isinstance(member, PathLike)
            else plain(member)
            for key, member in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return plain(value.tolist())  # of numpy and torch, the only way to Python's own numbers
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, PathLike):
        return plain(ModelReference(model=ModelPath(path=fspath(value))))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # subclasses of these, too
        if isinstance(value, kind):
            return kind(value)
    raise BadInputError(
        f"The config holds {value!r} of type {type(value).__name__}, which no merge config can; "
        "write it as text, a number, a list or a mapping."
    )


def _reads_back(model: ModelReference) -> bool:
    try:
        return bool(ModelReference.model_validate(str(model)) == model)
    except RuntimeError:  # more than one + or @
        return False
