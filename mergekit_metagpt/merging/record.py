"""The record of a merge: what went in, which coefficients it used, and how to repeat it."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.method.summary import Entry, Summary

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
    config: MergeConfiguration,
    source: str,
    inputs: list[dict[str, Any]],
    entries: Sequence[Entry],
    options: MergeOptions,
) -> dict[str, Any]:
    """Return the record of a merge that has just run in this process, as JSON types.

    Args:
        config: what was merged.
        source: its YAML, as it was written.
        inputs: the models, as they were before the merge; JSON types.
        entries: what the merge noted.
        options: MergeKit's options of the run.
    """
    summary = Summary(entries)
    return {
        "schema_version": _SCHEMA,
        "config": source,
        "method": config.merge_method,
        "base": None if config.base_model is None else str(config.base_model),
        **summary.as_json(),
        "inputs": inputs,
        "seed": options.random_seed,
        "options": deciding_options(config, options, by_direction=summary.by_direction),
        "versions": versions(),
    }


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
