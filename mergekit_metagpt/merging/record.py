"""The record of a merge: what went in, which coefficients it used, and how to repeat it."""

import os
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from mergekit.card import generate_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.merging.inputs import Inputs
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.names import canonical

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

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def merge_record(
    config: MergeConfiguration,
    source: str,
    inputs: Inputs,
    entries: Sequence[Entry],
    options: MergeOptions,
) -> dict[str, Any]:
    """Return the record of a merge that has just run in this process, as JSON types.

    Args:
        config: what was merged.
        source: its YAML, as it was written.
        inputs: the models, as they were before the merge.
        entries: what the merge noted.
        options: MergeKit's options of the run.
    """
    return {
        "config": source,
        "method": config.merge_method,
        "base": None if config.base_model is None else str(config.base_model),
        **Summary(entries).as_json(),
        "inputs": inputs.models,
        "seed": options.random_seed,
        "options": _deciding_options(config, options, entries),
        "versions": {
            name: version(name)
            for name in ("mergekit-metagpt", "mergekit", "torch", "transformers", "safetensors")
        },
    }


def _deciding_options(
    config: MergeConfiguration, options: MergeOptions, entries: Sequence[Entry]
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
    if config.merge_method != "metagpt" or any(entry.means for entry in entries):
        words += ["--num-threads", str(torch.get_num_threads())]
    return words


def write_card(
    path: Path, name: str, config: MergeConfiguration, source: str, record: dict[str, Any]
) -> None:
    """Write MergeKit's model card, with a section on the coefficients if there are any."""
    ordered = _OrderedConfiguration.model_validate(dict(config))
    text = generate_card(config=ordered, config_yaml=source, name=_escaped(name))
    card = ModelCard(_with_names_escaped(text, ordered))
    data: Any = card.data
    if record["experts"]:
        data.tags = [*(data.tags or []), "metagpt"]
        card.text = f"{card.text.rstrip()}\n\n{_section(config, record)}"
    data.base_model_relation = "merge"
    if not data.base_model:
        del data.base_model  # local paths only: the hub accepts no empty list
    card.save(path)


class _OrderedConfiguration(MergeConfiguration):
    """A config whose models come in a fixed order, so that two runs write the same card."""

    def referenced_models(self) -> list[ModelReference]:
        return canonical(super().referenced_models())


def _with_names_escaped(text: str, config: MergeConfiguration) -> str:
    """Return MergeKit's card with the names of models as text, not as Markdown."""
    models = iter(config.referenced_models())
    prose, heading, rest = text.partition("\n### Configuration\n")
    lines = []
    for line in prose.split("\n"):
        start, using, _ = line.partition(" merge method using ")
        if using and config.base_model is not None:
            line = f"{start}{using}{_model_md(config.base_model)} as a base."
            models = (model for model in models if model != config.base_model)
        elif line.startswith("* "):
            line = f"* {_model_md(next(models))}"
        lines.append(line)
    return "\n".join(lines) + heading + rest


def _model_md(model: ModelReference) -> str:
    paths = [path.path for path in (model.model, model.lora) if path]
    return " + ".join(
        f"[{_escaped(path)}](https://huggingface.co/{path})" if _is_on_hub(path) else _escaped(path)
        for path in paths
    )


def _is_on_hub(path: str) -> bool:
    """Return whether a path is one of the hub, without asking it."""
    return bool(_HUB_NAME.fullmatch(path)) and not os.path.exists(path)


def _escaped(name: str) -> str:
    """Return a name so that Markdown shows it as it is.

    >>> print(_escaped("a|b_<i>"))
    a\\|b\\_\\<i\\>
    """
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(name.split()))


def _section(config: MergeConfiguration, record: dict[str, Any]) -> str:
    models = {str(model): model for model in config.referenced_models()}
    varies = any(expert["least"] != expert["largest"] for expert in record["experts"])
    columns = ["mean coefficient", "least", "largest"] if varies else ["coefficient"]
    columns = ["expert", "L2 norm of τ", *columns]
    lines = [
        "### Scaling coefficients",
        "",
        f"Chosen by the closed form of [MetaGPT](https://arxiv.org/abs/2406.11385) from the task "
        f"vectors τ = θ - θ_0, at granularity `{' and '.join(record['granularity'])}`.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for expert in record["experts"]:
        keys = ["norm", "coefficient", *(["least", "largest"] if varies else [])]
        cells = [_model_md(models[expert["model"]]), *(f"{expert[key]:.6g}" for key in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    versions = record["versions"]
    seed = [] if record["seed"] is None else ["--random-seed", str(record["seed"])]
    words = ["mergekit-yaml", "mergekit_config.yml", "merged", *seed, *record["options"]]
    lines += [
        "",
        "All of them, the norms, and a fingerprint of every input are recorded in "
        "`metagpt.json`. To repeat the merge:",
        "",
        "```sh",
        f"pip install mergekit-metagpt=={versions['mergekit-metagpt']} "
        f"mergekit=={versions['mergekit']}",
        shlex.join(words),
        "```",
        "",
    ]
    return "\n".join(lines)
