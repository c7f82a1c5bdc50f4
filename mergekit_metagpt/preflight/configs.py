"""Keys and values of a merge config; needs no model."""

import importlib.resources
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from pydantic import ValidationError

from mergekit_metagpt.measure.headers import FLOAT_NAMES
from mergekit_metagpt.mergekit_private import chat_templates, compile_template
from mergekit_metagpt.method.parameters import with_priors
from mergekit_metagpt.planning.levels import Level, levels, settings
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.wording import instead, nearest, reason

# Keys that MergeKit reads but never uses.
_UNUSED = {"residual_weight"}


def unknown_keys(case: Case) -> Iterator[str]:
    """Find keys that MergeKit does not know."""
    parameters = {p.name for p in case.method.spec.parameters} if case.method else set()
    for level in levels(case.raw):
        known = set(level.schema.model_fields) - _UNUSED
        ignored = set() if level.path else {"name"}  # which mergekit-multi reads
        for key in level.values:
            if key in known | ignored:
                continue
            if level.schema is ModelReference and key == "path":
                continue  # the config's parser says what is lacking
            close = nearest(key, known - set(level.values))
            if not (close or level.path) and key in case.written.anchored:
                continue
            way = f"write {close} instead" if close else "remove it"
            if key in parameters and "parameters" in known:
                way = "move it under parameters there"
            yield (
                f"{case.file} has the unknown key {key}{level.at}, which MergeKit ignores; {way}."
            )


def ignored_parameters(case: Case) -> Iterator[str]:
    """Find parameters that the method does not have, or does not read where they are."""
    if case.method is None:
        return
    method, specs = case.method.spec.name, _specs(case)
    for level, name, _ in settings(case.raw):
        spec = specs.get(name)
        said = f"{case.file} sets the parameter {name}{level.at}"
        if spec is None:
            yield (
                f"{said}, which {method} does not have and MergeKit ignores; "
                f"{instead(name, specs)}."
            )
        elif level.is_input and spec.scope == ParameterScope.SHARED:
            yield (
                f"{said}, where MergeKit ignores it since all models share it; move it to the "
                "parameters of the whole merge."
            )
        elif spec.scope == ParameterScope.NON_BASE and _is_base(level, case.raw):
            yield f"{said}, where {method} ignores it since that model is the base; remove it."


def _is_base(level: Level, raw: dict[str, Any]) -> bool:
    """Whether a level is about the base of the whole merge, and no slice has another."""
    bases = [its.values["base_model"] for its in levels(raw) if "base_model" in its.values]
    return level.is_input and [level.values.get("model")] == bases


def bad_parameters(case: Case) -> Iterator[str]:
    """Find values of parameters that the method cannot use."""
    specs = _specs(case)
    for level, name, setting in settings(case.raw):
        spec = specs.get(name)
        if spec is None or (level.is_input and spec.scope == ParameterScope.SHARED):
            continue
        for value in _scalars(setting):
            if complaint := _complaint(spec, value):
                yield f"{case.file}{level.at}: {complaint}"


def _specs(case: Case) -> dict[str, ParameterSpec]:
    """Return the method's parameters by name; stock methods get the bounds of this package."""
    if case.method is None:
        return {}
    specs = {p.name: p for p in case.method.spec.parameters}
    if isinstance(case.method, GeneralizedTaskArithmeticMerge):
        for spec in with_priors(case.method.spec.parameters, is_plain=True):
            # Stock methods allow a negative weight.
            if spec.name in specs and spec.name != "weight":
                specs[spec.name] = spec
    return specs


def _scalars(setting: Any) -> Iterator[Any]:
    """Yield every value of a setting, through MergeKit's gradients and filters."""
    if isinstance(setting, dict):
        yield from _scalars(setting.get("value"))
    elif isinstance(setting, list):
        for member in setting:
            yield from _scalars(member)
    elif isinstance(setting, (bool, int, float, str)):
        yield setting


def _complaint(spec: ParameterSpec, value: Any) -> str | None:
    try:
        parsed = spec.validate(value)
    except ValidationError:
        wanted = getattr(spec.value_type, "__name__", str(spec.value_type))
        return f"Parameter {spec.name} must be a {wanted}, not {value!r}; correct it."
    except ValueError as error:
        return str(error)
    if isinstance(parsed, float) and not math.isfinite(parsed):
        return f"Parameter {spec.name} must be finite, not {value!r}; correct it."
    return None


def bad_dtypes(case: Case) -> Iterator[str]:
    """Find dtypes that MergeKit would fail on when it has read or merged the first tensor."""
    for key in ("dtype", "out_dtype"):
        name = getattr(case.config, key)
        if name and name.removeprefix("torch.") not in FLOAT_NAMES:
            yield (
                f"{case.file} has the {key} {name}, in which MergeKit cannot merge; "
                f"{instead(name, FLOAT_NAMES)}."
            )


def bad_template(case: Case) -> Iterator[str]:
    """Find a chat template that MergeKit would fail on after it has merged."""
    template = case.config.chat_template
    files = importlib.resources.files(chat_templates).iterdir()
    built_in = {Path(f.name).stem for f in files if f.name.endswith(".jinja")} | {"auto"}
    if not template or template in built_in:
        return
    if len(template) < 20 or "{" not in template:
        yield (
            f"{case.file} has the chat_template {template!r}, which is neither a template nor the "
            f"name of one of MergeKit's; {instead(template, built_in)}."
        )
        return
    try:
        compile_template(template)
    except Exception as error:  # of jinja2, which transformers imports when it needs it
        line = getattr(error, "lineno", 1)
        yield (
            f"{case.file} has a chat_template that is no Jinja template ({reason(error)}, in its "
            f"line {line}); correct it."
        )
