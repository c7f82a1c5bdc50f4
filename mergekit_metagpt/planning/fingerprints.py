"""Fingerprints, which tell model files apart without reading terabytes again."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import parts

_SAMPLES, _SAMPLE = 64, 1 << 16
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
