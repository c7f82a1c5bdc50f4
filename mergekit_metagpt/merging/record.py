"""The record of a merge: what went in, which coefficients it used, and how to repeat it.

In what is published, names of models on the hub stand for paths of this machine.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.identity import Stat, on_hub, sha256_of, stat_of
from mergekit_metagpt.measure.loaders import weight_files
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import parameter_sets
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.wording import BadInputError, instead

_SCHEMA = 2  # of metagpt.json

# MergeKit's options, besides the seed, that change what is written.
_DECIDING = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "trust_remote_code",
    "lora_merge_dtype",
    "device",
    "out_shard_size",
    "safe_serialization",
    "copy_tokenizer",
)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# The keys of configs and records whose text is a model: path, path@revision or path+lora.
_MODEL_KEYS = {"model", "base_model", "base", "lora", "path", "source", "tokenizer_source"}
_NO_MODELS = {"union", "base"}  # as the source of a tokenizer


@dataclass(frozen=True)
class Inputs:
    """The models of a merge, in canonical order, as they were before it began."""

    files: dict[ModelReference, dict[str, list[Path]]]  # of the model, and of its adapter
    stats: dict[str, Stat]
    contents: dict[Path, "Future[str]"]  # SHA-256s, which a thread takes while the merge reads

    @property
    def identity(self) -> list[Any]:
        """What the models are now, as JSON types."""
        return [[str(it), *Checkpoints(it, ()).identity(it)] for it in self.files]

    def as_json(self) -> list[dict[str, Any]]:
        """Return each model's name, commit and files with their SHA-256, as JSON types."""
        found = []
        for model, groups in self.files.items():
            cached = on_hub(LoaderCache().get(model).index.base_path)
            revision = cached[1] if cached else model.model.revision
            files = {kind: [self._file(path) for path in paths] for kind, paths in groups.items()}
            found.append({"model": str(model), "revision": revision, **files})
        return found

    def _file(self, path: Path) -> dict[str, Any]:
        content = self.contents[path].result()
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": content}


@contextmanager
def opened(job: Job) -> Iterator[Inputs]:
    """Open the models of a job, which applies their adapters, and look at their files."""
    files = {}
    for model in canonical(job.parsed.referenced_models()):
        files[model] = {"files": weight_files(LoaderCache().get(model))}  # with the adapter applied
        if model.lora:
            files[model]["adapter"] = sorted(Path(model.lora.path).glob("adapter_model.*"))
    paths = {path for groups in files.values() for each in groups.values() for path in each}
    reader = ThreadPoolExecutor(1)
    try:
        contents = {path: reader.submit(sha256_of, path) for path in paths}
        yield Inputs(files, {str(path): stat_of(path) for path in paths}, contents)
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def merge_record(
    job: Job, inputs: list[dict[str, Any]], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return the record of a job that has just merged; ``names`` stand for paths. JSON types."""
    config = job.parsed
    record: dict[str, Any] = {
        "schema_version": _SCHEMA,
        "config": job.config.text,
        "method": config.merge_method,
        "base": None if config.base_model is None else str(config.base_model),
        **Summary(job.entries).as_json(),
        "inputs": inputs,
        "seed": job.options.random_seed,
        "options": deciding_options(job),
        "versions": versions(),
    }
    if not names:
        return record
    named = renamed(record | {"config": job.config.raw}, lambda path: names.get(path, path))
    text = yaml.safe_dump(named["config"], sort_keys=False, allow_unicode=True)
    return {**named, "config": text}


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the bytes of the output depend on."""
    names = ("mergekit-metagpt", "mergekit", "torch", "transformers", "safetensors")
    return {name: version(name) for name in names}


def deciding_options(job: Job) -> list[str]:
    """Return the command's options, besides the seed, that the bytes of the output depend on."""
    config, defaults, words = job.parsed, MergeOptions(), list[str]()
    for name in _DECIDING:
        value, option = getattr(job.options, name), name.replace("_", "-")
        if isinstance(value, bool) and value != getattr(defaults, name):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value != getattr(defaults, name):
            words += [f"--{option}", str(value)]
    if any(model.lora for model in config.referenced_models()):
        words += ["--lora-merge-cache", "lora-cache"]
    # The last bits of MergeKit's sums, and of matrix products, depend on it.
    granularities = [str(parameters.get("granularity")) for parameters in parameter_sets(config)]
    if config.merge_method != "metagpt" or any("direction" in it for it in granularities):
        words += ["--num-threads", str(torch.get_num_threads())]
    return words


def hub_names(config: Any, given: Sequence[str]) -> dict[str, str]:
    """Return names by path of a raw config: given as PATH=USER/NAME, or of the hub's cache."""
    paths: dict[str, str] = {}
    renamed(config, lambda path: paths.setdefault(path, path))
    names = {path: "@".join(cached) for path in paths if (cached := on_hub(path))}
    for pair in given:
        path, _, name = pair.rpartition("=")
        if path not in paths:
            raise BadInputError(f"{pair} names no path of the config; {instead(path, paths)}.")
        if not HUB_NAME.fullmatch(name):
            raise BadInputError(f"{pair} gives no name of the hub; write {path}=USER/NAME.")
        if name in names.values():
            raise BadInputError(f"{pair} gives two models one name; write each model's own.")
        names[path] = name
    return names


def renamed(value: Any, name_of: Callable[[str], str], key: str = "") -> Any:
    """Return JSON or YAML types, found under a key, with other names for the paths of models."""
    if isinstance(value, dict):
        return {key: renamed(child, name_of, key) for key, child in value.items()}
    if isinstance(value, list):
        return [renamed(child, name_of, key) for child in value]
    is_word = str(key).endswith("source") and value in _NO_MODELS
    if key not in _MODEL_KEYS or not isinstance(value, str) or is_word:
        return value
    return re.sub(r"(^|\+)([^@+]+)", lambda found: found[1] + name_of(found[2]), value)
