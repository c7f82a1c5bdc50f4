"""MergeKit's loaders, which it keeps once per process: their files, and how to forget them."""

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.headers import read_header
from mergekit_metagpt.measure.hub import HubLoader, open_on_hub
from mergekit_metagpt.measure.vocabularies import tokenizers_agree

# How far to read ahead in each file, in bytes: more than a disk reads while a tensor is used.
_WINDOW = 1 << 27
# So many windows back is no jump: a layer's tensors are not used in the order of the file.
_BACK = 4

# How far each file has been asked for.
_ASKED: dict[str, int] = {}
_LOCK = threading.Lock()


def weight_files(model: ModelReference) -> list[Path]:
    """Return the weight files that MergeKit reads a model from."""
    index = LoaderCache().get(model).index
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
    open_on_hub(on_hub)
    LoaderCache().setup(options)


def read_ahead(file: str, tensor: str) -> None:
    """Let the disk read a tensor of a safetensors file, and what follows it.

    Weight files are mapped into memory. Without this, the disk rests while a tensor is used.
    It does nothing where there is no ``posix_fadvise``, as on macOS and Windows.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    header = read_header(file, os.path.dirname(file)).get(tensor)
    if header is None:
        return
    start = header.start
    with _LOCK:
        asked = _ASKED.get(file, 0)
        if not start <= asked <= start + _BACK * _WINDOW:  # the first tensor, or a jump
            asked = start
        if asked > start + _WINDOW // 2:
            return
        _ASKED[file] = start + _WINDOW
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), asked, start + _WINDOW - asked, os.POSIX_FADV_WILLNEED)
