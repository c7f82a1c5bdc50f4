"""The headers of weight files: names, shapes and dtypes of tensors, but not their data."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergekit_metagpt.measure.identity import Stat, stat_of
from mergekit_metagpt.mergekit_private import is_cut_short, is_ignored, tied_names
from mergekit_metagpt.names import COMPUTED, MASKS
from mergekit_metagpt.wording import BadInputError, reason

# safetensors' names of the dtypes that torch can calculate with.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
# The same dtypes, as a merge config names them.
FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a weight file says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it, such as F32 or BF16
    file: str  # the path of the weight file; empty for a tensor that MergeKit makes from others
    start: int = 0  # where its data begin in a file on the hub, in bytes
    end: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor, file: str = "") -> "Header":
        """Describe a tensor, which may have no data."""
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return cls(tuple(tensor.shape), dtype, file)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to compute in; None for quantized ones."""
        return _DTYPES.get(self.dtype)

    @property
    def bytes(self) -> int:
        """The size of the tensor's data, if it is not quantized."""
        return math.prod(self.shape) * (self.torch_dtype or torch.int8).itemsize


def unread(
    held: Mapping[str, Header], read: set[str], architecture: str, is_tied: bool
) -> list[str]:
    """Return the parameters among a model's tensors that a merge would lose.

    ``read`` are the names that the merge knows; ``is_tied``, whether the model's config says that
    the head is the embeddings.
    """
    for pair in map(set, tied_names(architecture) if is_tied else ()):
        read = read | pair if read & pair else read
    return [
        name
        for name, header in held.items()
        if header.dtype in FLOATS  # others are counters
        and not (name.endswith(MASKS) and len(header.shape) == 4)
        and not (name in read or name.endswith(COMPUTED) or is_ignored(architecture, name))
    ]


def read_header(path: str, model: Any) -> Mapping[str, Header]:
    """Return the headers of one weight file by tensor, or raise a BadInputError about the file."""
    try:
        return _read(path, stat_of(path))
    except FileNotFoundError:
        fault = "is missing; download it again"
    except OSError as error:
        fault = f"cannot be read ({reason(error)}); download it again"
    except BadInputError as error:
        fault = str(error)
    raise BadInputError(f"Weight file {path} of model {model} {fault}.")


def require_file(path: str) -> None:
    """Raise an OSError for a pipe or a device, which may never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError("it is a pipe or a device, not a file")


@lru_cache(maxsize=4096)
def _read(path: str, _stat: Stat) -> dict[str, Header]:
    require_file(path)
    with open(path, "rb") as file:
        if file.read(99).startswith(b"version https://git-lfs"):
            raise BadInputError("is only a pointer of Git LFS; run git lfs pull there")
    try:
        if path.lower().endswith(".safetensors"):
            with safe_open(path, framework="pt") as opened:  # if the data fit its header
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    n: Header(tuple(t.get_shape()), t.get_dtype(), path) for n, t in parts.items()
                }
        # With map_location meta, torch skips the data of an archive.
        held = torch.load(path, map_location="meta", weights_only=True)
        tensors = held.get("state_dict", held)  # as MergeKit reads it
        return {name: Header.of(t, path) for name, t in tensors.items() if torch.is_tensor(t)}
    except (SafetensorError, OSError) as error:
        cut = "truncated, or longer than its header says"
        said = cut if is_cut_short(error) else f"corrupt ({reason(error)})"
        raise BadInputError(f"is {said}; download it again") from None
    except Exception as error:  # an unpickler raises whatever its input makes it raise
        raise BadInputError(
            f"is corrupt, or holds more than tensors ({reason(error)}); download it again, or save "
            "it as safetensors"
        ) from None
