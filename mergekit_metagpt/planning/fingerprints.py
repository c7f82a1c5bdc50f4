"""Fingerprints, which tell model files apart without reading terabytes again."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.hub import HubLoader
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import parts

_SAMPLES, _SAMPLE = 64, 1 << 16
_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
# The files that decide what a model with its adapter applied looks like.
_FILES = ("*.safetensors", "*.bin", "*.index.json", "config.json", "adapter_config.json")


def fingerprint(file: Path) -> str:
    """Return the SHA-256 of a file's size and of 64 blocks of 64 KiB, evenly spread over it.

    It tells checkpoints apart without reading all of them. It does not protect against
    deliberate forgery.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return f"sha256-sampled:{digest.hexdigest()}"


def described(model: ModelReference) -> dict[str, Any]:
    """Return a model's name, revision and weight files with their fingerprints, as JSON types.

    MergeKit's loaders find the files, and apply an adapter first. A model that is read from the
    hub has no files here; its revision is the commit.
    """
    loader = LoaderCache().get(model)
    stored = _SNAPSHOT.search(str(loader.index.base_path))
    commit = loader.commit if isinstance(loader, HubLoader) else stored and stored.group(1)
    adapter = sorted(Path(model.lora.path).glob("adapter_model.*")) if model.lora else []
    return {
        "model": str(model),
        "revision": commit or model.model.revision,
        "files": _fingerprints(weight_files(model)),  # with the adapter applied
        **({"adapter": _fingerprints(adapter)} if model.lora else {}),
    }


def fingerprints_of(files: Iterable[Path]) -> list[str]:
    """Return what tells the weights in some files from others, wherever they are."""
    return sorted(map(fingerprint, files))


def weight_files(model: ModelReference) -> list[Path]:
    """Return the weight files that MergeKit reads a model from."""
    index = LoaderCache().get(model).index
    return [Path(index.base_path, shard.filename) for shard in index.shards]


def _fingerprints(files: list[Path]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "bytes": f.stat().st_size, "fingerprint": fingerprint(f)} for f in files
    ]


def with_fresh_lora_cache(options: MergeOptions, config: MergeConfiguration) -> MergeOptions:
    """Return options whose LoRA cache belongs to the adapters and bases as they are now.

    MergeKit names the entries of this cache after the paths of the models. So it would reuse
    an old entry for an adapter that was trained again, or for another project's ``./lora``.
    The returned options therefore use a subdirectory of the cache, named after the
    contents of the files. Options that use it already stay as they are.
    """
    named = {*config.referenced_models(), *(part.base for part in parts(config))}
    adapted = canonical(model for model in named if model is not None and model.lora)
    if not (options.lora_merge_cache and adapted):
        return options
    digest = hashlib.sha256(str(options.lora_merge_dtype).encode())
    for model in adapted:
        for path in (model.model, model.lora):
            if path is not None:
                digest.update("\n".join((f"\n{path}", *_contents(path))).encode())
    key = digest.hexdigest()[:16]
    if os.path.basename(options.lora_merge_cache) == key:
        return options
    cache = os.path.join(options.lora_merge_cache, key)
    return options.model_copy(update={"lora_merge_cache": cache})


def _contents(model: ModelPath) -> Iterator[str]:
    """Yield what the files of a directory hold; nothing for a model on the hub."""
    for pattern in _FILES:
        for file in sorted(Path(model.path).glob(pattern)):
            try:
                yield f"{file.name} {fingerprint(file) if file.is_file() else ''}"
            except OSError:
                yield file.name  # the preflight reports it
