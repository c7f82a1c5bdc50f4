"""Keys and values of a merge config; needs no model, but for what reaches no tensor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mergekit import merge_methods
from mergekit.config import InputModelDefinition, InputSliceDefinition, MergeConfiguration
from mergekit.merge_methods.base import BasePolicy, MergeMethod, ParameterScope, ParameterSpec
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.measure.headers import FLOAT_NAMES
from mergekit_metagpt.mergekit_private import compile_template, set_chat_template
from mergekit_metagpt.method.parameters import with_priors
from mergekit_metagpt.planning.config import is_within, parts
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.wording import instead, nearest, reason

# Keys that MergeKit reads but never uses.
_UNUSED = {"residual_weight"}


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


def _levels(job: Job) -> Iterator[Level]:
    yield Level("", job.config.raw, MergeConfiguration)  # also if the rest cannot be read
    yield from _within(job.config.raw, job.parsed, "")


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


def _settings(job: Job) -> Iterator[tuple[Level, str, Any]]:
    """Yield every parameter that a config sets, and where."""
    for level in _levels(job):
        if "parameters" in level.schema.model_fields:
            for name, setting in (level.values.get("parameters") or {}).items():
                yield level, name, setting


def unknown_keys(job: Job) -> Iterator[str]:
    """Find keys that MergeKit does not know."""
    for level in _levels(job):
        known = level.schema.model_fields.keys() - _UNUSED
        for key in level.values:
            if key in known:
                continue
            close = nearest(key, known - level.values.keys())
            # At the top, mergekit-multi reads names, and anchors may have a place of their own.
            is_meant = key == "name" or (not close and key in job.config.anchored)
            if is_meant and not level.path:
                continue
            way = f"write {close} instead" if close else "remove it"
            if key in _specs(job) and "parameters" in known:
                way = "move it under parameters there"
            yield (
                f"{job.config} has the unknown key {key}{level.at}, which MergeKit ignores; {way}."
            )


def _method(job: Job) -> MergeMethod | None:
    """Return the method that a config names; None if MergeKit does not know it."""
    methods = {method.spec.name: method for method in merge_methods.registered_methods()}
    return methods.get(str(job.config.raw.get("merge_method")))


def _specs(job: Job) -> dict[str, ParameterSpec]:
    """Return the method's parameters by name; stock methods get the bounds of this package."""
    method = _method(job)
    specs = {spec.name: spec for spec in method.spec.parameters} if method else {}
    if isinstance(method, GeneralizedTaskArithmeticMerge):
        bounded = {spec.name: spec for spec in with_priors(method.spec.parameters, is_plain=True)}
        # Stock methods allow a negative weight.
        specs |= {name: bounded[name] for name in specs if name != "weight"}
    return specs


def ignored_parameters(job: Job) -> Iterator[str]:
    """Find parameters that the method does not have, or does not read where they are."""
    method, specs = job.parsed.merge_method, _specs(job)
    bases = {part.base for part in parts(job.parsed)}
    for level, name, _ in _settings(job) if _method(job) else ():
        spec = specs.get(name)
        is_input = level.schema in (InputModelDefinition, InputSliceDefinition)
        said = f"{job.config} sets the parameter {name}{level.at}"
        if spec is None:
            yield (
                f"{said}, which {method} does not have and MergeKit ignores; "
                f"{instead(name, specs)}."
            )
        elif is_input and spec.scope == ParameterScope.SHARED:
            yield (
                f"{said}, where MergeKit ignores it since all models share it; move it to the "
                "parameters of the whole merge."
            )
        elif is_input and spec.scope == ParameterScope.NON_BASE and bases == {level.model}:
            yield f"{said}, where {method} ignores it since that model is the base; remove it."


def bad_parameters(job: Job) -> Iterator[str]:
    """Find values of parameters that the method cannot use."""
    specs = _specs(job)
    for level, name, setting in _settings(job):
        for value in _scalars(setting) if name in specs else ():
            try:
                parsed = specs[name].validate(value)
                if isinstance(parsed, float) and not math.isfinite(parsed):
                    raise ValueError(f"Parameter {name} must be finite, not {value!r}; correct it.")
            except ValidationError:
                kind = specs[name].value_type
                yield (
                    f"{job.config}{level.at}: Parameter {name} must be a "
                    f"{getattr(kind, '__name__', kind)}, not {value!r}; correct it."
                )
            except ValueError as error:
                yield f"{job.config}{level.at}: {error}"


def _scalars(setting: Any) -> Iterator[Any]:
    """Yield every value of a setting, through MergeKit's gradients and filters; [] sets nothing."""
    if isinstance(setting, list) and setting:
        for member in setting:
            yield from _scalars(member)
    else:
        yield from _scalars(setting["value"]) if isinstance(setting, dict) else [setting]


def unused_values(job: Job) -> Iterator[str]:
    """Find values behind filters that no tensor takes: each takes the first that fits its name."""
    merges = job.outputs.tensors
    for level, name, setting in _settings(job):
        at = level.path
        here = [p for p in parts(job.parsed) if is_within(p.path, at) or is_within(at, p.path)]
        near = [merge for merge in merges if any(part.holds(*merge.place) for part in here)]
        loads = [load for merge in near for load in merge.loads.values()]
        names = sorted({merge.name for merge in near} | {load.tensor for load in loads})
        before: list[set[str]] = []
        for entry in setting if isinstance(setting, list) else [setting]:
            if not (names and isinstance(entry, dict)):
                continue
            wanted = entry.get("filter")
            fitting = {it for it in names if wanted in (None, "", "*") or wanted in it}
            said = f"{job.config} has the filter {wanted or '*'} in the parameter {name}{level.at}"
            if not fitting:
                yield (
                    f"{said}, which no tensor there has in its name; write a part of a name as "
                    f"plain text, such as {names[len(names) // 2]}."
                )
            elif any(fitting <= taken for taken in before):
                yield (
                    f"{said}, whose value is never used, since one before it takes the same "
                    "tensors; write the narrower one first, or remove one of them."
                )
            before.append(fitting)


def bad_dtypes(job: Job) -> Iterator[str]:
    """Find dtypes that MergeKit would fail on when it has read or merged the first tensor."""
    for key in ("dtype", "out_dtype"):
        name = getattr(job.parsed, key)
        if name and name.removeprefix("torch.") not in FLOAT_NAMES:
            yield (
                f"{job.config} has the {key} {name}, in which MergeKit cannot merge; "
                f"{instead(name, FLOAT_NAMES)}."
            )


def bad_template(job: Job) -> Iterator[str]:
    """Find a chat template that MergeKit would fail on, or write as it is, after it has merged."""
    tokenizer: Any = SimpleNamespace(chat_template=None)
    if job.parsed.chat_template != "auto":
        try:
            set_chat_template(tokenizer, job.parsed)
            compile_template(tokenizer.chat_template or "")
        except Exception as error:  # of jinja2, which transformers imports when it needs it
            line = getattr(error, "lineno", None)
            at = f", in its line {line}" if line else ""
            yield (
                f"{job.config} has a chat_template that is neither a Jinja template nor the name "
                f"of one of MergeKit's ({reason(error)}{at}); correct it, or name one, such as "
                "chatml."
            )


def empty_parts(job: Job) -> Iterator[str]:
    """Find lists without an expert and ranges without a layer, which MergeKit would merge so."""
    method = _method(job)
    needs_base = method is not None and method.spec.contract.base == BasePolicy.REQUIRED
    for part in parts(job.parsed):
        if needs_base and part.base and all(entry.model == part.base for entry in part.inputs):
            yield (
                f"{job.config} merges no expert at {part.path}, which lists nothing but the base "
                f"{part.base}; add the models that were fine-tuned from it."
            )
        for entry in part.inputs:
            its = getattr(entry, "layer_range", (0, 1))
            if not 0 <= its[0] < its[1]:
                yield (
                    f"{job.config} takes the layer_range {list(its)} of model {entry.model} at "
                    f"{part.path}, which holds no layer; write the first layer, from 0, and the "
                    "one after the last, such as [0, 3]."
                )
