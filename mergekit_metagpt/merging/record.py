"""The record of a merge: what went in, which coefficients it used, and how to repeat it."""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from mergekit.card import generate_card, modelref_md
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.granularities import GRANULARITIES
from mergekit_metagpt.merging.inputs import Inputs
from mergekit_metagpt.method.session import Entry
from mergekit_metagpt.names import canonical


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
    experts = canonical({expert for entry in entries for expert in entry.experts})
    scopes = _scopes(entries, experts)
    squared = [
        math.fsum(row["squared_norms"][t] for row in scopes.values()) for t in range(len(experts))
    ]
    return {
        "config": source,
        "method": config.merge_method,
        "base": None if config.base_model is None else str(config.base_model),
        "granularity": sorted({entry.granularity for entry in entries}),
        "experts": [
            {"model": str(expert), "norm": norm**0.5, "squared_norm": norm}
            for expert, norm in zip(experts, squared, strict=True)
        ],
        "coefficients": scopes,
        "inputs": inputs.models,
        "seed": options.random_seed if options.random_seed is not None else torch.initial_seed(),
        "versions": {
            name: version(name)
            for name in ("mergekit-metagpt", "mergekit", "torch", "transformers", "safetensors")
        },
    }


def _scopes(entries: Sequence[Entry], experts: Sequence[Any]) -> dict[str, Any]:
    """Return norms and coefficients of the model, each layer or each tensor."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry.tensor or ""):
        name = entry.tensor or ""
        scope = GRANULARITIES[entry.granularity].scope(name)
        norms = dict(zip(entry.experts, entry.squared_norms, strict=True))
        shares = dict(zip(entry.experts, entry.coefficients, strict=True))
        row = {
            "squared_norms": [norms.get(expert, 0.0) for expert in experts],
            "coefficients": [shares.get(expert, 0.0) for expert in experts],
        }
        if found.setdefault(scope, row) != row:  # priors that vary within the scope
            found[name] = {**row, "squared_norms": [0.0] * len(experts), "scope": scope}
    return found


def write_card(
    path: Path, name: str, config: MergeConfiguration, source: str, record: dict[str, Any]
) -> None:
    """Write MergeKit's model card, with a section on the coefficients if there are any."""
    ordered = _OrderedConfiguration.model_validate(dict(config))
    card = ModelCard(generate_card(config=ordered, config_yaml=source, name=name))
    data: Any = card.data
    if record["experts"]:
        data.tags = [*(data.tags or []), "metagpt"]
        card.text = f"{card.text.rstrip()}\n\n{_section(config, record)}"
    data.base_model_relation = "merge"
    if not data.base_model:
        del data.base_model  # local paths only: the hub accepts no empty list
    card.save(path)


class _OrderedConfiguration(MergeConfiguration):
    """A config whose models come in one order, so that two runs write the same card."""

    def referenced_models(self) -> list[ModelReference]:
        return canonical(super().referenced_models())


def _section(config: MergeConfiguration, record: dict[str, Any]) -> str:
    rows = record["coefficients"]
    shares = [row["coefficients"] for row in rows.values()]
    granularity = " and ".join(record["granularity"])
    lines = [
        "### Scaling coefficients",
        "",
        f"Chosen by the closed form of [MetaGPT](https://arxiv.org/abs/2406.11385) from the task "
        f"vectors τ = θ - θ_0, at granularity `{granularity}`.",
        "",
        "| expert | L2 norm of τ | coefficient |" if len(rows) == 1 else
        "| expert | L2 norm of τ | mean coefficient | least | largest |",
        "|---|---|---|" if len(rows) == 1 else "|---|---|---|---|---|",
    ]  # fmt: skip
    # Not parsed from strings: a path may hold the + and @ of references.
    references = {str(model): model for model in config.referenced_models()}
    for t, expert in enumerate(record["experts"]):
        own = [row[t] for row in shares]
        figures = [math.fsum(own) / len(own)]
        if len(rows) > 1:
            figures += [min(own), max(own)]
        model = modelref_md(references[expert["model"]])
        cells = [model, f"{expert['norm']:.6g}", *(f"{figure:.6g}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    versions = record["versions"]
    lines += [
        "",
        "All of them, the norms, and a fingerprint of every input stand in `metagpt.json`. To "
        "repeat the merge:",
        "",
        "```sh",
        f"pip install mergekit-metagpt=={versions['mergekit-metagpt']} "
        f"mergekit=={versions['mergekit']}",
        f"mergekit-yaml mergekit_config.yml merged --random-seed {record['seed']}",
        "```",
        "",
    ]
    return "\n".join(lines)
