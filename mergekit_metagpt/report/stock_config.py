"""The same merge as stock MergeKit YAML, with explicit weights."""

from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, ConfigYamlDumper
from pydantic import BaseModel

from mergekit_metagpt import __version__
from mergekit_metagpt.names import layer_of
from mergekit_metagpt.planning.config import Part, parameter_sets, parts
from mergekit_metagpt.planning.forecast import Forecast, TensorForecast

Weight = float | list[ConditionalParameter]


def stock_config(forecast: Forecast) -> str:
    """Return a config that MergeKit merges to the same result without this package.

    In float32 the sparsified methods give the same bytes, except for the random ones, for rescaling
    and for the choice among equal magnitudes. The plain method agrees to two rounding steps,
    because MergeKit adds up differences.
    """
    config = forecast.config.model_copy(deep=True)
    config.merge_method = forecast.method.stock.spec.name
    own = {"weight", "granularity", "exponent"}
    for parameters in parameter_sets(config):
        for name in own & parameters.keys():
            del parameters[name]
    if forecast.method.is_plain:
        # Normalizing changes nothing in the plain method, but the stock one would round once more.
        config.parameters = {**(config.parameters or {}), "normalize": False}
    _set_dtypes(config, forecast)

    for part in list(parts(config)):
        _set_weights(part, forecast)
    document = _plain(config)
    return _header(forecast) + yaml.dump(document, Dumper=ConfigYamlDumper, sort_keys=False)


def _plain(value: Any) -> Any:
    """Return a part of a config as plain YAML types, without defaults.

    MergeKit's own serializer fails for a model path that contains a space. If the path contains
    a + or @, the text that it writes is read back as a different model.
    """
    if isinstance(value, ModelReference) and _reads_back(value):
        return str(value)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        set_ones = {name: getattr(value, name) for name in fields}
        return {n: _plain(v) for n, v in set_ones.items() if v != fields[n].default}
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list | tuple) else value


def _reads_back(model: ModelReference) -> bool:
    try:
        return bool(ModelReference.model_validate(str(model)) == model)
    except RuntimeError:  # more than one + or @
        return False


def _set_weights(part: Part, forecast: Forecast) -> None:
    """Set the weights of every expert in a part; sort its models into canonical order."""
    entries: dict[Any, Any] = {entry.model: entry for entry in part.inputs}
    tensors = [tensor for tensor in forecast.tensors if _is_of(tensor, part)]
    for expert in entries.keys() & set(forecast.experts):
        weights = {
            tensor.inputs[expert]: dict(
                zip(tensor.entry.experts, tensor.entry.coefficients, strict=True)
            ).get(expert, 0.0)
            for tensor in tensors
            if expert in tensor.inputs
        }
        entry = entries[expert]
        own = {"weight": _setting(weights, forecast.buffers)}
        entry.parameters = {**own, **(entry.parameters or {})}
    if forecast.base in entries:
        entries[forecast.base].parameters = None
    order = [*forecast.experts, forecast.base]  # stock methods add in the order of the list
    part.replace_inputs(sorted(entries.values(), key=lambda entry: order.index(entry.model)))


def _is_of(tensor: TensorForecast, part: Part) -> bool:
    """Return whether a part of a config merges a tensor.

    MergeKit's planner puts tensors in modules even if the config has none. A part without a
    module therefore matches every module.
    """
    module, number = part.place
    if not module and not part.is_slice:
        return True
    return tensor.place[1] == number and module in ("", tensor.place[0])


def _setting(weights: dict[str, float], buffers: list[str]) -> Weight:
    """Write weights by tensor as briefly as MergeKit's filters allow.

    MergeKit uses the first filter that is a substring of the tensor's name.
    """
    if len(set(weights.values())) == 1:
        return next(iter(weights.values()))
    by_layer: dict[str, set[float]] = {}
    for name, weight in weights.items():
        by_layer.setdefault(layer_of(name) or "", set()).add(weight)
    brief = {}
    for name, weight in weights.items():
        layer = layer_of(name)
        brief[f"{layer}." if layer and len(by_layer[layer]) == 1 else name] = weight
    for filters in (brief, weights):
        # Longest first: a filter must not match a longer name that contains it.
        ordered = sorted(filters, key=len, reverse=True)
        if all(
            filters[next(f for f in ordered if f in name)] == weight
            for name, weight in weights.items()
        ):
            break
    shown = [f for f in filters if f in ordered]
    if any(a != b and a in b for a in shown for b in shown):
        shown = ordered
    # MergeKit requires a weight even for tensors that it only copies.
    settings = {**{f: filters[f] for f in shown}, **dict.fromkeys(buffers, 0.0)}
    return [ConditionalParameter(filter=name, value=weight) for name, weight in settings.items()]


def _set_dtypes(config: Any, forecast: Forecast) -> None:
    """Make the stock method calculate in float32 and round once, as this package does."""
    stored = set(forecast.survey.dtypes.values())
    if len(stored) != 1 or not stored <= {torch.bfloat16, torch.float16}:
        return
    name = str(stored.pop()).removeprefix("torch.")
    if config.dtype in (None, name):
        config.dtype, config.out_dtype = "float32", config.out_dtype or name


def _header(forecast: Forecast) -> str:
    summary = forecast.summary
    exponents = " and ".join(f"{k:g}" for k in sorted({e.exponent for e in summary.entries}))
    lines = [
        f"Written by mergekit-metagpt {__version__} (MetaGPT, https://arxiv.org/abs/2406.11385).",
        f"merge_method: {forecast.method.spec.name}, "
        f"granularity: {' and '.join(summary.granularities)}, exponent: {exponents}.",
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
