"""The record of a merge: what went in, which coefficients it used, and how to repeat it."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.merging.hub_names import renamed
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.job import Job

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


def merge_record(
    job: Job, inputs: list[dict[str, Any]], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return the record of a job that has just merged; ``names`` stand for paths. JSON types."""
    config, options, summary = job.parsed, job.options, Summary(job.entries)
    record: dict[str, Any] = {
        "schema_version": _SCHEMA,
        "config": job.config.text,
        "method": config.merge_method,
        "base": None if config.base_model is None else str(config.base_model),
        **summary.as_json(),
        "inputs": inputs,
        "seed": options.random_seed,
        "options": deciding_options(config, options, by_direction=summary.by_direction),
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


def deciding_options(
    config: MergeConfiguration, options: MergeOptions, *, by_direction: bool
) -> list[str]:
    """Return the command's options, besides the seed, that the bytes of the output depend on."""
    defaults = MergeOptions()
    words: list[str] = []
    for name in _DECIDING:
        value, option = getattr(options, name), name.replace("_", "-")
        if value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    if any(model.lora for model in config.referenced_models()):
        words += ["--lora-merge-cache", "lora-cache"]
    # The last bits of MergeKit's sums, and of matrix products, depend on it.
    if config.merge_method != "metagpt" or by_direction:
        words += ["--num-threads", str(torch.get_num_threads())]
    return words
