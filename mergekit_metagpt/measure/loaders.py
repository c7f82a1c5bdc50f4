"""MergeKit's loaders, which it keeps once per process: their files, and how to forget them.

Models on the Hugging Face hub are read one tensor at a time, and not stored on the disk.
"""

import json
import logging
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.headers import Header
from mergekit_metagpt.measure.locations import Directory, Repository, locate
from mergekit_metagpt.measure.vocabularies import tokenizers_agree
from mergekit_metagpt.measure.weights import read_weights
from mergekit_metagpt.wording import BadInputError

LOG = logging.getLogger(__name__)


class HubLoader(LazyTensorLoader):
    """Stands in for MergeKit's loader of a model, whose tensors are of one commit; for pickle."""

    def __init__(
        self, model: ModelReference, repository: Repository, headers: Mapping[str, Header]
    ) -> None:
        paths = {name: header.file for name, header in headers.items()}
        super().__init__(ShardedTensorIndex("", True, paths, shards=[]))
        self.model, self.repository, self.headers = model, repository, headers

    def __reduce__(self) -> tuple[Any, ...]:
        return HubLoader, (self.model, self.repository, self.headers)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Return the tensor of this name, which MergeKit has found in the index."""
        at = self.headers[key]
        data = self.repository.read(at.file, at.start, at.end)
        entry = {"dtype": at.dtype, "shape": at.shape, "data_offsets": [0, len(data)]}
        header = json.dumps({key: entry}).encode()  # as a file of one tensor
        file = struct.pack("<Q", len(header)) + header + data
        return safetensors.torch.load(file)[key].to(device)


def is_looked_up(model: ModelReference) -> bool:
    """Return whether the hub is asked about a model: one that is no path, unless offline."""
    return not (huggingface_hub.constants.HF_HUB_OFFLINE or os.path.exists(model.model.path))


def find_on_hub(models: Iterable[ModelReference], options: MergeOptions) -> list[HubLoader]:
    """Let MergeKit read a config's models from the hub; return the loaders of those that it can.

    MergeKit downloads the others that are not on this machine. The log says which, and why.

    Raises:
        BadInputError: if a model cannot be found, its files do not fit together, or are not sent.
    """
    models, found = sorted(models, key=str), list[HubLoader]()
    for model in filter(is_looked_up, models):
        place = locate(model.model, options)
        if isinstance(place, Directory):
            continue
        why = ""
        if model.lora:
            why = "has an adapter, which is applied to the whole model"
        elif not any(file.startswith("model.safetensors") for file in place.sizes):
            why = "has no safetensors files"
        if why:
            LOG.warning("Model %s %s, so MergeKit downloads it.", model, why)
            continue
        weights = read_weights(place)
        if weights.problems:
            raise BadInputError(*weights.problems)
        found.append(HubLoader(model, place, weights.tensors))
    for model in models if found else []:
        if arch_info_for_config(model.config(options.trust_remote_code)) is None:
            LOG.warning(
                "MergeKit does not know the architecture of model %s. It infers it from the files "
                "of all models, so it downloads them.",
                model,
            )
            return []
    mergekit_private.open_loaders.update({loader.model: loader for loader in found})
    return found


def weight_files(loader: LazyTensorLoader) -> list[Path]:
    """Return the weight files that a loader reads."""
    index = loader.index
    return [Path(index.base_path, shard.filename) for shard in index.shards]


def forget_files() -> None:
    """Forget open files and tokenizers, so that every thread reads the models again."""
    mergekit_private.open_loaders.clear()
    tokenizers_agree.cache_clear()


def forget_models(models: Iterable[ModelReference]) -> None:
    """Close the weight files of models. MergeKit knows open ones by the model's name only."""
    for model in models:
        mergekit_private.open_loaders.pop(model, None)
        mergekit_private.SimpleLoaderCache().loaders.pop(model.model.path, None)


def set_up_worker(options: MergeOptions, on_hub: Sequence[HubLoader] = ()) -> None:
    """Give a worker process the loader options of the main one, and let it read files again.

    Models ``on_hub`` are read from there.
    """
    forget_files()
    mergekit_private.open_loaders.update({loader.model: loader for loader in on_hub})
    LoaderCache().setup(options)
