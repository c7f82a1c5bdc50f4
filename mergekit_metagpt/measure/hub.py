"""Models on the Hugging Face hub, read one tensor at a time and not stored.

The header of a safetensors file says where each tensor lies in it, and the hub sends parts of
files. So a survey, which needs one tensor of each model at a time, needs no room on the disk.
"""

import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors.torch
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it is documented there
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: ``size`` bytes from byte ``start`` of a file on; its dtype and shape."""

    file: str
    start: int
    size: int
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class HubModel:
    """A model on the hub whose tensors can be read one by one. It can be pickled.

    Attributes:
        model: the model as a config names it.
        commit: what its revision was when it was looked up; all tensors are of this commit.
        places: where each tensor is, by its name.
    """

    model: ModelReference
    commit: str
    places: Mapping[str, _Place]

    def load(self, name: str) -> Tensor:
        """Return a tensor as it is stored, on the CPU.

        Raises:
            BadInputError: if the hub does not send it. The message names the model and the file.
        """
        at = self.places[name]
        entry = {"dtype": at.dtype, "shape": at.shape, "data_offsets": [0, at.size]}
        header = json.dumps({name: entry}).encode()
        data = _fetch(self.model, self.commit, at.file, at.start, at.size)
        return safetensors.torch.load(struct.pack("<Q", len(header)) + header + data)[name]


class HubLoader(LazyTensorLoader):
    """Stands in for MergeKit's loader of a model."""

    def __init__(self, model: HubModel) -> None:
        paths = {name: place.file for name, place in model.places.items()}
        super().__init__(ShardedTensorIndex("", True, paths, shards=[]))
        self._model = model

    @property
    def commit(self) -> str:
        """The commit that all tensors are of."""
        return self._model.commit

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return the tensor of this name, or else of the first alias that the model holds."""
        name = next((n for n in (key, *(aliases or ())) if n in self._model.places), None)
        if name is not None:
            return self._model.load(name).to(device)
        if raise_on_missing:
            raise KeyError(key)
        return None


def open_on_hub(models: Iterable[HubModel]) -> None:
    """Let MergeKit read these models from the hub, in every thread of this process."""
    for found in models:
        mergekit_private.open_loaders[found.model] = HubLoader(found)


@contextmanager
def reading_from_hub(models: Sequence[HubModel]) -> Iterator[None]:
    """Let MergeKit read these models from the hub, until the context ends."""
    open_on_hub(models)
    try:
        yield
    finally:
        for found in models:
            mergekit_private.open_loaders.pop(found.model, None)


def is_looked_up(model: ModelReference) -> bool:
    """Return whether the hub is asked about a model: one that is no path, unless offline."""
    return not (huggingface_hub.constants.HF_HUB_OFFLINE or os.path.exists(model.model.path))


def find_on_hub(models: Iterable[ModelReference], options: MergeOptions) -> list[HubModel]:
    """Return those models that are not on this machine and can be read from the hub.

    MergeKit downloads the others that are not on this machine. The log says which, and why.

    Args:
        models: all models of a config.
        options: MergeKit's options.

    Raises:
        BadInputError: if the files of a model do not fit together, or are not sent.
        Exception: of the hub's client, if a model cannot be looked up.
    """
    models = sorted(models, key=str)
    found = [_look_up(model, options) for model in models if is_looked_up(model)]
    readable = [model for model in found if model is not None]
    for model in models if readable else []:
        if arch_info_for_config(model.config(options.trust_remote_code)) is None:
            LOG.warning(
                "MergeKit does not know the architecture of model %s. It infers it from the files "
                "of all models, so it downloads them.",
                model,
            )
            return []
    return readable


def _look_up(model: ModelReference, options: MergeOptions) -> HubModel | None:
    path, cache = model.model.path, options.transformers_cache
    info = huggingface_hub.model_info(path, revision=model.model.revision, files_metadata=True)
    commit = str(info.sha)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if _is_stored(path, commit, sizes, cache):
        return None
    if model.lora:
        why = "has an adapter, which is applied to the whole model"
    elif not sizes.keys() & {_FILE, _INDEX}:
        why = "has no safetensors files"
    else:
        return HubModel(model, commit, _places(model, commit, sizes, cache))
    LOG.warning("Model %s %s, so MergeKit downloads it.", model, why)
    return None


def _is_stored(path: str, commit: str, files: Iterable[str], cache: str | None) -> bool:
    """Return whether the cache of the hub holds all weight files that MergeKit would download."""
    files = list(files)
    weights = [file for file in files if file.endswith(".safetensors")]
    weights = weights or [file for file in files if file.endswith(".bin")]
    return all(
        isinstance(huggingface_hub.try_to_load_from_cache(path, file, cache, commit), str)
        for file in weights
    )


def _places(
    model: ModelReference, commit: str, sizes: Mapping[str, int], cache: str | None
) -> dict[str, _Place]:
    """Return where the tensors of a model are; an index counts, as for MergeKit, if there is one.

    Args:
        model: the model.
        commit: its commit.
        sizes: the size of each of its files, in bytes.
        cache: where the index is stored.
    """
    if _INDEX not in sizes:
        return _places_in(model, commit, _FILE, sizes[_FILE])
    index = huggingface_hub.hf_hub_download(
        model.model.path, _INDEX, revision=commit, cache_dir=cache
    )
    files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    held = {
        file: _places_in(model, commit, file, sizes[file])
        for file in sorted(set(files.values()))
        if file in sizes
    }
    for name, file in files.items():
        if name not in held.get(file, ()):
            raise BadInputError(
                f"The index of model {model} on the hub puts tensor {name} in {file}, which does "
                "not hold it; choose another revision."
            )
    return {name: held[file][name] for name, file in files.items()}


def _places_in(model: ModelReference, commit: str, file: str, size: int) -> dict[str, _Place]:
    """Return where the tensors of a safetensors file are, whose size is in bytes."""
    (length,) = struct.unpack("<Q", _fetch(model, commit, file, 0, 8))
    first = 8 + length
    header = _fetch(model, commit, file, 8, length) if first <= size else b"{}"
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    if first + max((e["data_offsets"][1] for e in entries.values()), default=0) != size:
        raise BadInputError(
            f"File {file} of model {model} on the hub is truncated, or no safetensors file; choose "
            "another revision."
        )
    return {
        name: _Place(file, first + begin, end - begin, entry["dtype"], entry["shape"])
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }


def _fetch(model: ModelReference, commit: str, file: str, start: int, size: int) -> bytes:
    """Return ``size`` bytes of a file, from byte ``start`` on; ask again if a connection ends."""
    if not size:
        return b""
    url = huggingface_hub.hf_hub_url(model.model.path, file, revision=commit)
    part = {"Range": f"bytes={start}-{start + size - 1}"}
    try:
        response = http_backoff(
            "GET",
            url,
            headers={**build_hf_headers(), **part},
            timeout=huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT,
            # Older releases of the library take a body that ends early for a reason to give up.
            retry_on_exceptions=Exception,
        )
        hf_raise_for_status(response)
        data: bytes = response.content
    except Exception as error:  # of the hub's client, or of its connection
        why = reason(error)
    else:
        if len(data) == size:
            return data
        why = f"{len(data)} bytes came instead of {size}"
    raise BadInputError(
        f"File {file} of model {model} cannot be read from the hub ({why}); run the command again, "
        "or with --keep to download the model."
    )
