"""The headers of weight files: names, shapes and dtypes of tensors, but not their data."""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mergekit.io import ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo
from safetensors import SafetensorError, safe_open

from mergekit_metagpt.mergekit_private import is_cut_short
from mergekit_metagpt.names import number_of_layer
from mergekit_metagpt.wording import BadInputError, counted, reason

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

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """What a weight file says about one tensor.

    Attributes:
        shape: of the tensor.
        dtype: as safetensors calls it, such as F32 or BF16.
        file: the path of the weight file; empty for a tensor that MergeKit makes from others.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str

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
        dtype = self.torch_dtype
        return math.prod(self.shape) * (dtype.itemsize if dtype else 1)


@dataclass
class Weights:
    """All tensors of a checkpoint, as far as they could be found.

    Attributes:
        directory: where the files are; empty for a repository on the hub.
        tensors: the headers that MergeKit will find, by the name of the tensor.
        problems: a sentence for each fault of the files.
    """

    directory: str = ""
    tensors: dict[str, Header] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def by_layer(self) -> dict[str | None, dict[str, Header]]:
        """The headers of each layer; those of no layer under None."""
        layers: dict[str | None, dict[str, Header]] = {}
        for name, header in self.tensors.items():
            layers.setdefault(number_of_layer(name), {})[name] = header
        return layers

    @property
    def files(self) -> list[str]:
        """The paths of the weight files."""
        return sorted({header.file for header in self.tensors.values()})

    @property
    def index(self) -> ShardedTensorIndex:
        """The index that MergeKit would make of these files."""
        root = self.directory or os.curdir
        paths = {name: os.path.relpath(header.file, root) for name, header in self.tensors.items()}
        names = {
            file: [name for name in paths if paths[name] == file] for file in set(paths.values())
        }
        return ShardedTensorIndex(
            base_path=self.directory,
            is_safetensors=all(file.endswith(".safetensors") for file in names),
            tensor_paths=paths,
            shards=[ShardInfo(file, names[file]) for file in sorted(names)],
        )


def read_weights(directory: str, model: Any) -> Weights:
    """Read the headers of a model's directory, from the files that MergeKit would choose."""
    weights = Weights(directory)
    for file in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(directory, file)
        if os.path.exists(f"{path}.index.json"):
            if os.path.exists(path):
                weights.problems.append(
                    f"Model {model} holds both {path} and {file}.index.json, and MergeKit reads "
                    "only the latter's files; remove whichever is out of date."
                )
            _read_shards(weights, f"{path}.index.json", model)
            return weights
        if os.path.exists(path):
            try:
                weights.tensors = read_header(path, model)
            except BadInputError as error:
                weights.problems += error.args
            return weights
    stray = sorted(
        p.name for p in Path(directory).glob("*") if p.suffix in (".safetensors", ".bin")
    )
    weights.problems.append(
        f"Model {model} has weight files such as {stray[0]} in {directory}, but neither "
        "model.safetensors nor an index of shards, so MergeKit does not find them; download it "
        "again."
        if stray
        else f"Model {model} is no checkpoint: {directory} holds no weights (model.safetensors or "
        "pytorch_model.bin); correct the path, or download it again."
    )
    return weights


def _read_shards(weights: Weights, index: str, model: Any) -> None:
    """Read the headers of all files in an index, and check that the index matches them."""
    try:
        _require_file(index)
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(os.path.join(weights.directory, shard), set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        weights.problems.append(
            f"Index {index} of model {model} is corrupt ({reason(error)}); download it again."
        )
        return
    if outside := sorted(filter(_leads_out, weight_map.values())):
        weights.problems.append(
            f"Index {index} of model {model} names {outside[0]}, a file outside of the model; "
            "download it again from someone you trust."
        )
        return
    for shard, named in sorted(shards.items()):
        try:
            held = read_header(shard, model)
        except BadInputError as error:
            weights.problems += error.args
            continue
        weights.tensors |= {name: held[name] for name in named & held.keys()}
        weights.problems += _differences(index, shard, sorted(named), sorted(held), model)


def _leads_out(shard: str) -> bool:
    """Whether the path of a shard leads out of the model's directory."""
    path = Path(os.path.normpath(shard))
    return bool(path.anchor) or ".." in path.parts  # on Windows /a is not absolute


def _differences(
    index: str, shard: str, named: list[str], held: list[str], model: Any
) -> Iterator[str]:
    if lost := [name for name in named if name not in held]:
        yield (
            f"Index {index} of model {model} is stale: it puts {counted(lost)} in "
            f"{os.path.basename(shard)}, which does not hold it; save or download the model again."
        )
    if hidden := [name for name in held if name not in named]:
        yield (
            f"Index {index} of model {model} is stale: {os.path.basename(shard)} holds "
            f"{counted(hidden)}, which the index does not name and MergeKit would not find; save "
            "or download the model again."
        )


def read_header(path: str, model: Any) -> dict[str, Header]:
    """Return the headers of one weight file, by the name of the tensor.

    Raises:
        BadInputError: if the file is missing, or is not what its name says.
    """
    what = f"Weight file {path} of model {model}"
    again = "download it again"
    try:
        _require_file(path)
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError:
        raise BadInputError(f"{what} is missing; {again}.") from None
    except OSError as error:
        raise BadInputError(f"{what} cannot be read ({reason(error)}); {again}.") from None
    if not start:
        raise BadInputError(f"{what} is empty; {again}.")
    if start == _LFS_POINTER:
        raise BadInputError(f"{what} is only a pointer of Git LFS; run git lfs pull there.")
    safetensors = path.lower().endswith(".safetensors")
    try:
        return dict(_safetensors(path) if safetensors else _pickle(path))
    except (SafetensorError, OSError) as error:
        cut = "truncated, or longer than its header says"
        said = cut if is_cut_short(error) else f"corrupt ({reason(error)})"
        raise BadInputError(f"{what} is {said}; {again}.") from None
    except Exception as error:  # an unpickler raises whatever its input makes it raise
        raise BadInputError(
            f"{what} is corrupt, or holds more than tensors ({reason(error)}); {again}, or save "
            "it as safetensors."
        ) from None


def _require_file(path: str) -> None:
    """Raise an OSError for a pipe or a device, which may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is a pipe or a device, not a file")


def _safetensors(path: str) -> Iterator[tuple[str, Header]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, since it is no mapping
            tensor = file.get_slice(name)
            yield name, Header(tuple(tensor.get_shape()), tensor.get_dtype(), path)


def _pickle(path: str) -> Iterator[tuple[str, Header]]:
    # With map_location meta, torch skips the data of an archive.
    for name, tensor in torch.load(path, map_location="meta", weights_only=True).items():
        if isinstance(tensor, torch.Tensor):
            yield name, Header.of(tensor, path)
