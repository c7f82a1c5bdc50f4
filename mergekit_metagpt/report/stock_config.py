"""The same merge as stock MergeKit YAML, with explicit weights."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from mergekit.config import (
    ConditionalParameter,
    ConfigYamlDumper,
    InputModelDefinition,
    MergeConfiguration,
)
from mergekit.merge_methods.base import ParameterScope

from mergekit_metagpt import __version__
from mergekit_metagpt.mergekit_private import set_chat_template
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.config import Part, parameter_sets, parts, plain
from mergekit_metagpt.planning.forecast import Forecast

Weight = float | list[ConditionalParameter]


def stock_config(forecast: Forecast) -> str:
    """Return a config that MergeKit merges to the same result without this package."""
    config = forecast.config.model_copy(deep=True)
    config.merge_method = forecast.method.stock.spec.name
    specs = {parameter.name: parameter for parameter in forecast.method.stock.spec.parameters}
    for parameters in parameter_sets(config):
        for name in parameters.keys() - (specs.keys() - {"weight"}):
            del parameters[name]
    for part in parts(config):
        for entry in part.inputs:  # where MergeKit ignores what all models share
            its = (entry.parameters or {}).items()
            entry.parameters = {
                n: v for n, v in its if specs[n].scope is not ParameterScope.SHARED
            } or None
    if forecast.method.is_plain:
        # Normalizing changes nothing in the plain method, but the stock one would round once more.
        config.parameters = {**(config.parameters or {}), "normalize": False}
    _set_dtypes(config, forecast)
    if config.chat_template == "auto":
        _set_chat_template(config)
    for part in list(parts(config)):
        _set_weights(part, forecast)
    return _header(forecast) + yaml.dump(plain(config), Dumper=ConfigYamlDumper, sort_keys=False)


def _set_chat_template(config: MergeConfiguration) -> None:
    """Write out the template that ``auto`` takes here, if those of the models differ.

    It is the first of the most frequent ones, of which stock MergeKit takes any.
    """
    templates = Counter[str]()
    for model in config.referenced_models():
        models = [InputModelDefinition(model=model)]
        of_one = MergeConfiguration(merge_method="linear", models=models, chat_template="auto")
        tokenizer = SimpleNamespace(chat_template="")
        set_chat_template(tokenizer, of_one)
        if tokenizer.chat_template:
            templates[tokenizer.chat_template] += 1
    if len(templates) > 1:
        config.chat_template = templates.most_common(1)[0][0]


def _set_weights(part: Part, forecast: Forecast) -> None:
    """Set the weights of every expert in a part; sort its models into canonical order."""
    entries: dict[Any, Any] = {entry.model: entry for entry in part.inputs}
    chosen = forecast.entries
    merges = [m for m in forecast.merges if m.name in chosen and part.holds(*m.place)]
    # If no expert differs from the base, any weights give the base, but not all may be 0.
    moves = any(any(entry.squared_norms) for entry in chosen.values())
    buffers = [merge.name for merge in forecast.merges if merge.name not in chosen]
    for expert in entries.keys() & set(forecast.experts):
        weights = {
            merge.loads[expert].tensor: chosen[merge.name].row([expert])[0] if moves else 1.0
            for merge in merges
            if expert in merge.loads
        }
        setting = _setting(weights, buffers)
        entries[expert].parameters = {"weight": setting, **(entries[expert].parameters or {})}
    if forecast.base in entries:
        entries[forecast.base].parameters = None
    order = [*forecast.experts, forecast.base]  # stock methods add in the order of the list
    part.inputs[:] = sorted(entries.values(), key=lambda entry: order.index(entry.model))


def _setting(weights: dict[str, float], buffers: list[str]) -> Weight:
    """Write weights by tensor as briefly as MergeKit's filters allow.

    MergeKit uses the first filter that is a substring of the tensor's name.
    """
    if len(set(weights.values())) == 1:
        return next(iter(weights.values()))
    by_layer: dict[str | None, set[float]] = {}
    for name, weight in weights.items():
        by_layer.setdefault(layer_of(name), set()).add(weight)
    even = {layer for layer, own in by_layer.items() if layer and len(own) == 1}
    brief = {f"{it}." if (it := layer_of(name)) in even else name: w for name, w in weights.items()}
    settings: dict[str, float] = {}
    for filters in (brief, weights):
        overlap = any(a != b and a in b for a in filters for b in filters)
        # Longest first, where one would match a longer name that contains it.
        ordered = sorted(filters, key=len, reverse=True) if overlap else filters
        settings = {name: filters[name] for name in ordered}
        matched = {name: next(f for f in settings if f in name) for name in weights}
        if all(settings[matched[name]] == weight for name, weight in weights.items()):
            break
    # MergeKit requires a weight even for tensors that it only copies.
    settings |= {name: 0.0 for name in buffers if not any(f in name for f in settings)}
    return [ConditionalParameter(filter=name, value=weight) for name, weight in settings.items()]


def _set_dtypes(config: Any, forecast: Forecast) -> None:
    """Make the stock method calculate in float32 and round once, as this package does."""
    stored = {it.dtype for it in forecast.survey.tensors.values()}
    if len(stored) != 1 or not stored <= {torch.bfloat16, torch.float16}:
        return
    name = str(stored.pop()).removeprefix("torch.")
    if config.dtype in (None, name):
        config.dtype, config.out_dtype = "float32", config.out_dtype or name


def _header(forecast: Forecast) -> str:
    summary = forecast.summary
    lines = [
        f"Written by mergekit-metagpt {__version__} (MetaGPT, https://arxiv.org/abs/2406.11385).",
        f"merge_method: {forecast.method.spec.name}, granularity: {summary.granularity}, "
        f"exponent: {summary.exponent}.",
        "Each weight is w_t ‖τ_t‖^k / Σ_j w_j ‖τ_j‖^k, from the task vectors τ_t = θ_t - θ_0.",
        f"Base: {forecast.base}; the L2 norms and coefficients are:",
    ]
    for expert in summary.experts:
        spread = f" on average, {expert.least:.6g} to {expert.largest:.6g}" * summary.varies
        lines.append(
            f"  {expert.model}: norm {expert.norm:.6g}, coefficient {expert.mean:.6g}{spread}"
        )
    if forecast.method.is_random:
        lines.append(
            "This method drops parameters at random. MergeKit and mergekit-metagpt draw "
            "different masks, so the merged weights differ."
        )
    elif not forecast.method.is_plain:
        lines.append(
            "Of equal magnitudes mergekit-metagpt keeps the first in memory, and MergeKit those "
            "that its sort happens to put first. Sums for rescale differ in their last bits."
        )
    return "".join(f"# {line}\n" for line in lines)
