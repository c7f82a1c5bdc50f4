"""MergeKit's loaders, which it keeps once per process: their files, and how to forget them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.hub import HubLoader, open_on_hub
from mergekit_metagpt.measure.vocabularies import tokenizers_agree


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
    open_on_hub(on_hub)
    LoaderCache().setup(options)
