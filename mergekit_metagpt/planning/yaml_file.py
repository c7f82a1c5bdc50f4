"""Turns Python objects into what YAML can hold."""

from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from mergekit.common import ModelPath, ModelReference
from pydantic import BaseModel

from mergekit_metagpt.wording import BadInputError


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
