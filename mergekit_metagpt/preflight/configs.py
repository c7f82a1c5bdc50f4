"""Keys and values of a merge config; needs no model."""

import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit.merge_methods.base import ParameterScope

from mergekit_metagpt.measure.headers import FLOAT_NAMES
from mergekit_metagpt.mergekit_private import chat_templates, compile_template
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
    method, specs = case.method.spec.name, {p.name: p for p in case.method.spec.parameters}
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
