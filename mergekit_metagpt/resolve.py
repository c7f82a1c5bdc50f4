"""The same merge as stock MergeKit YAML, with explicit weights."""

from typing import Any

import torch
import yaml
from mergekit.config import ConditionalParameter, ConfigYamlDumper

from mergekit_metagpt import __version__
from mergekit_metagpt.plan import Plan, parameter_sets
from mergekit_metagpt.planner import Place
from mergekit_metagpt.survey import layer_of

Weight = float | list[ConditionalParameter]


def resolve(plan: Plan) -> str:
    """Return a config that MergeKit merges to the same result without this package.

    In float32 the sparsified methods give the same bytes, except for the random ones; the plain
    method agrees to two rounding steps, since MergeKit adds up differences.
    """
    config = plan.config.model_copy(deep=True)
    config.merge_method = plan.method.stock.spec.name
    own = {"weight", "granularity", "exponent"}
    for parameters in parameter_sets(config):
        for name in own & parameters.keys():
            del parameters[name]
    if plan.method.is_plain:
        # They are no part of the plain method, while normalize rounds once more in the stock one.
        config.parameters = {**(config.parameters or {}), "normalize": False}
    _set_dtypes(config, plan)

    parts: list[tuple[Any, set[Place]]] = []
    if config.models is not None:
        parts.append((config, {tensor.place for tensor in plan.tensors}))
    for number, part in enumerate(config.slices or []):
        parts.append((part, {tensor.place for tensor in plan.tensors if tensor.place[1] == number}))
    for name, module in (config.modules or {}).items():
        if module.models is not None:
            parts.append((module, {(name, 0)}))
        for number, part in enumerate(module.slices or []):
            parts.append((part, {(name, number)}))
    for part, places in parts:
        _set_weights(part, places, plan)
    document = config.model_dump(exclude_defaults=True, mode="json")
    return _header(plan) + yaml.dump(document, Dumper=ConfigYamlDumper, sort_keys=False)


def _set_weights(part: Any, places: set[Place], plan: Plan) -> None:
    """Give every expert of one list of models its weights; put the list in canonical order."""
    field = "sources" if hasattr(part, "sources") else "models"
    entries = {entry.model: entry for entry in getattr(part, field)}
    for expert in entries.keys() & set(plan.experts):
        weights = {
            tensor.inputs[expert]: plan.row(tensor)[plan.experts.index(expert)]
            for tensor in plan.tensors
            if tensor.place in places and expert in tensor.inputs
        }
        entry = entries[expert]
        entry.parameters = {"weight": _setting(weights, plan.buffers), **(entry.parameters or {})}
    if plan.base in entries:
        entries[plan.base].parameters = None
    order = [*plan.experts, plan.base]  # stock methods add in the order of the list
    setattr(part, field, sorted(entries.values(), key=lambda entry: order.index(entry.model)))


def _setting(weights: dict[str, float], buffers: list[str]) -> Weight:
    """Write weights by tensor as briefly as MergeKit's filters allow.

    A filter is a substring of the tensor's name, and the first that fits decides.
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
        # Longest first: a name that is part of another one must not speak for it.
        ordered = sorted(filters, key=len, reverse=True)
        if all(
            filters[next(f for f in ordered if f in name)] == weight
            for name, weight in weights.items()
        ):
            break
    shown = [f for f in filters if f in ordered]
    if any(a != b and a in b for a in shown for b in shown):
        shown = ordered
    # MergeKit wants a weight for what it copies, too.
    settings = {**{f: filters[f] for f in shown}, **dict.fromkeys(buffers, 0.0)}
    return [ConditionalParameter(filter=name, value=weight) for name, weight in settings.items()]


def _set_dtypes(config: Any, plan: Plan) -> None:
    """Let the stock method calculate in float32, as this package does, and round once."""
    stored = set(plan.survey.dtypes.values())
    if len(stored) != 1 or not stored <= {torch.bfloat16, torch.float16}:
        return
    name = str(stored.pop()).removeprefix("torch.")
    if config.dtype in (None, name):
        config.dtype, config.out_dtype = "float32", config.out_dtype or name


def _header(plan: Plan) -> str:
    lines = [
        f"Written by mergekit-metagpt {__version__} (MetaGPT, https://arxiv.org/abs/2406.11385).",
        f"merge_method: {plan.method.spec.name}, granularity: {plan.granularity}, "
        f"exponent: {plan.exponent:g}.",
        "Each weight is w_t ‖τ_t‖^k / Σ_j w_j ‖τ_j‖^k, from the task vectors τ_t = θ_t - θ_0.",
        f"Base: {plan.base}; over the whole model the L2 norms and coefficients are:",
    ]
    rows = zip(plan.experts, plan.survey.model, plan.coefficients, strict=True)
    lines += [f"  {model}: norm {norm**0.5:.6g}, coefficient {c:.6g}" for model, norm, c in rows]
    if plan.method.is_random:
        lines.append(
            "This method drops parameters at random: MergeKit draws other masks than "
            "mergekit-metagpt does, so that the merged weights differ."
        )
    return "".join(f"# {line}\n" for line in lines)
