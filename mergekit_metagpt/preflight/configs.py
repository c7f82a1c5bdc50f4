"""Keys and values of a merge config; needs no model, but for what reaches no tensor."""

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.config import InputModelDefinition, InputSliceDefinition, MergeConfiguration
from mergekit.merge_methods.base import BasePolicy, ParameterScope, ParameterSpec
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.measure.headers import FLOAT_NAMES
from mergekit_metagpt.mergekit_private import chat_templates, compile_template
from mergekit_metagpt.planning.config import is_within, parts
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.wording import BadInputError, instead, nearest, reason


@dataclass(frozen=True)
class Level:
    """A mapping in a config, and the class that MergeKit reads it into."""

    path: str
    values: dict[Any, Any]
    schema: type[BaseModel]
    model: Any = None  # that it is about

    @property
    def at(self) -> str:
        """The place in words."""
        model = f" ({self.model})" if self.model else ""
        return f" at {self.path}{model}" if self.path else ""

    @property
    def is_input(self) -> bool:
        """Whether it is about one model."""
        return self.schema in (InputModelDefinition, InputSliceDefinition)


def _levels(case: Case) -> Iterator[Level]:
    yield Level("", case.raw, MergeConfiguration)  # the first, also if the rest cannot be read
    yield from _within(case.raw, case.config, "")


def _within(raw: Any, read: Any, path: str) -> Iterator[Level]:
    """Walk through what is written and what MergeKit has read, side by side."""
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(raw, list) and isinstance(read, list):
        inner = [(f"[{number}]", *pair) for number, pair in enumerate(zip(raw, read, strict=True))]
    elif isinstance(raw, dict) and isinstance(read, BaseModel | dict):
        inner = [(f".{key}", raw.get(key), member) for key, member in dict(read).items()]
    for end, value, member in inner:
        place = f"{path}{end}".lstrip(".")
        if isinstance(value, dict) and isinstance(member, BaseModel):
            yield Level(place, value, type(member), getattr(member, "model", None))
        yield from _within(value, member, place)


def _settings(case: Case) -> Iterator[tuple[Level, str, Any]]:
    """Yield every parameter that a config sets, and where."""
    for level in _levels(case):
        for name, setting in (level.values.get("parameters") or {}).items():
            yield level, name, setting


def unknown_keys(case: Case) -> Iterator[str]:
    """Find keys that MergeKit does not know."""
    for level in _levels(case):
        known = level.schema.model_fields.keys()
        for key in level.values:
            close = nearest(key, known - level.values.keys())
            # At the top, mergekit-multi reads names, and anchors may have a place of their own.
            is_meant = key == "name" or (not close and key in case.written.anchored)
            if key in known or (is_meant and not level.path):
                continue
            way = f"write {close} instead" if close else "remove it"
            if key in _specs(case) and "parameters" in known:
                way = "move it under parameters there"
            yield (
                f"{case.file} has the unknown key {key}{level.at}, which MergeKit ignores; {way}."
            )


def _specs(case: Case) -> dict[str, ParameterSpec]:
    """Return the method's parameters by name."""
    return {spec.name: spec for spec in case.method.spec.parameters} if case.method else {}


def ignored_parameters(case: Case) -> Iterator[str]:
    """Find parameters that the method does not have, or does not read where they are."""
    if case.method is None:
        return
    method, specs = case.method.spec.name, _specs(case)
    bases = {part.base for part in parts(case.config)}
    for level, name, _ in _settings(case):
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
        elif level.is_input and spec.scope == ParameterScope.NON_BASE and bases == {level.model}:
            yield f"{said}, where {method} ignores it since that model is the base; remove it."


def bad_parameters(case: Case) -> Iterator[str]:
    """Find values of parameters that the method cannot use."""
    specs = _specs(case)
    for level, name, setting in _settings(case):
        for value in _scalars(setting) if name in specs else ():
            try:
                specs[name].validate(value)
            except ValidationError:
                kind = specs[name].value_type
                yield (
                    f"{case.file}{level.at}: Parameter {name} must be a "
                    f"{getattr(kind, '__name__', kind)}, not {value!r}; correct it."
                )
            except ValueError as error:  # of this package's methods
                yield f"{case.file}{level.at}: {error}"


def _scalars(setting: Any) -> Iterator[Any]:
    """Yield every value of a setting, through MergeKit's gradients and filters."""
    if isinstance(setting, list):
        for member in setting:
            yield from _scalars(member)
    else:
        yield from _scalars(setting["value"]) if isinstance(setting, dict) else [setting]


def hidden_values(case: Case) -> Iterator[str]:
    """Find values that MergeKit never reaches: it takes the first whose filter fits."""
    for level, name, setting in _settings(case):
        entries = _entries(setting)
        path = f"{level.path}.parameters.{name}".lstrip(".")
        for number, entry in enumerate(entries):
            before = (n for n in range(number) if _fits(entries[n], entry.get("filter")))
            if (first := next(before, None)) is not None:
                yield (
                    f"{case.file} has a value at {path}[{number}] that is never used, since "
                    f"{path}[{first}] before it takes the same tensors; write the narrower one "
                    "first, or remove one of them."
                )


def idle_filters(case: Case) -> Iterator[str]:
    """Find filters that fit no tensor of the merge."""
    merges = [tensor.merge for tensor in case.outputs.tensors]
    for level, name, setting in _settings(case):
        at = level.path
        here = [p for p in parts(case.config) if is_within(p.path, at) or is_within(at, p.path)]
        near = [merge for merge in merges if any(part.holds(merge.place) for part in here)]
        names = sorted({name for merge in near for name in (merge.name, *merge.inputs.values())})
        for entry in _entries(setting):
            if names and not any(_fits(entry, name) for name in names):
                yield (
                    f"{case.file} has the filter {entry['filter']} in the parameter "
                    f"{name}{level.at}, which no tensor there has in its name; write a part of a "
                    f"name as plain text, such as {names[len(names) // 2]}."
                )


def _entries(setting: Any) -> list[dict[str, Any]]:
    """Return the values of a setting that may have filters."""
    found = setting if isinstance(setting, list) else [setting]
    return [entry for entry in found if isinstance(entry, dict)]


def _fits(entry: dict[str, Any], tensor: str | None) -> bool:
    """Whether MergeKit takes a value for a tensor; None stands for all tensors."""
    wanted = entry.get("filter")
    return wanted in (None, "", "*") or (tensor is not None and wanted in tensor)


def bad_dtypes(case: Case) -> Iterator[str]:
    """Find dtypes that MergeKit would fail on when it has read or merged the first tensor."""
    for what, name in (
        (f"{case.file} has the dtype", case.config.dtype),
        (f"{case.file} has the out_dtype", case.config.out_dtype),
        ("The command has the --lora-merge-dtype", case.options.lora_merge_dtype),
    ):
        if name and name.removeprefix("torch.") not in FLOAT_NAMES:
            yield f"{what} {name}, in which MergeKit cannot merge; {instead(name, FLOAT_NAMES)}."


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


def no_experts(case: Case) -> Iterator[str]:
    """Find lists of nothing but the base, which MergeKit would write as it is."""
    if case.method is None or case.method.spec.contract.base != BasePolicy.REQUIRED:
        return
    for part in parts(case.config):
        if part.base and not set(part.models) - {part.base}:
            yield (
                f"{case.file} merges no expert at {part.path}, which lists nothing but the base "
                f"{part.base}; add the models that were fine-tuned from it."
            )


def no_layers(case: Case) -> list[str]:
    """Refuse ranges of layers that are empty: MergeKit would plan a model without these layers."""
    found = [(part.path, entry) for part in parts(case.config) for entry in part.inputs]
    problems = [
        f"{case.file} takes the layer_range {list(its)} of model {entry.model} at {path}, which "
        "holds no layer; write the first layer, from 0, and the one after the last, such as [0, 3]."
        for path, entry in found
        if not 0 <= (its := getattr(entry, "layer_range", (0, 1)))[0] < its[1]
    ]
    if problems:
        raise BadInputError(*problems)
    return []
