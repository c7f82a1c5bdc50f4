"""What can be wrong with a merge config, before any model is looked at."""

import importlib.resources
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit._data import chat_templates
from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import MergeMethod, ParameterScope, ParameterSpec
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel, ValidationError

from mergekit_metagpt.parameters import with_priors
from mergekit_metagpt.preflight.wording import PreflightError, instead, nearest, reason

# The keys of a config under which MergeKit reads mappings into classes of its own.
_CHILDREN: dict[str, type[BaseModel]] = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
    "modules": OutputModuleDefinition,
    "tokenizer": TokenizerConfig,
}

DTYPES = ("float16", "bfloat16", "float32", "float64")


def read_yaml(file: str) -> dict[str, Any]:
    """Return a config as it stands in its file.

    Raises:
        PreflightError: if it cannot be read, or is no mapping.
    """
    try:
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreflightError(f"Merge config {file} does not exist; correct its path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(
            f"Merge config {file} cannot be read ({reason(error)}); name a YAML file."
        ) from None
    except yaml.composer.ComposerError:
        raise PreflightError(
            f"Merge config {file} holds several merges, one after another; split it, or run it "
            "with mergekit-multi."
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise PreflightError(f"Merge config {file} is not YAML ({where}); correct it.") from None
    if not isinstance(raw, dict):
        raise PreflightError(
            f"Merge config {file} is no mapping of keys to values; start from one of "
            "example_configs."
        )
    return raw


def parse(raw: dict[str, Any], file: str) -> MergeConfiguration:
    """Return a config as MergeKit reads it.

    Raises:
        PreflightError: with a sentence for each value that MergeKit cannot read.
    """
    try:
        return MergeConfiguration.model_validate(raw)
    except ValidationError as error:
        places: dict[tuple[int | str, ...], str] = {}
        for found in error.errors():
            place = _existing(raw, found["loc"])
            if found["type"] == "missing":
                sentence = f"{file} lacks {_written(place, found['loc'][-1])}; add it."
            else:
                said = found["msg"][:1].lower() + found["msg"][1:]
                sentence = f"{file} is wrong at {_written(place)}: {said}; correct it."
            places.setdefault(place, sentence)  # one of a union's many complaints
        raise PreflightError(*places.values()) from None
    except (RuntimeError, TypeError) as error:
        raise PreflightError(f"{file} is wrong: {str(error).rstrip('.')}; correct it.") from None


def _existing(raw: Any, path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the part of a pydantic location that the config has, without names of types."""
    for depth, key in enumerate(path):
        try:
            raw = raw[key]
        except (KeyError, IndexError, TypeError):
            return path[:depth]
    return path


def _written(path: tuple[int | str, ...], *last: int | str) -> str:
    keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in (*path, *last))
    return "".join(keys).lstrip(".")


@dataclass(frozen=True)
class Level:
    """A mapping in a config that MergeKit reads into a class of its own."""

    place: str
    values: dict[Any, Any]
    schema: type[BaseModel]

    @property
    def at(self) -> str:
        """The place in words, with the model that it is about."""
        model = f" ({self.values['model']})" if "model" in self.values else ""
        return f" at {self.place}{model}" if self.place else ""

    @property
    def is_input(self) -> bool:
        """Whether it is about one model."""
        return self.schema in (InputModelDefinition, InputSliceDefinition)


def levels(
    values: dict[Any, Any], schema: type[BaseModel] = MergeConfiguration, place: str = ""
) -> Iterator[Level]:
    """Yield a config and all levels within it, whether MergeKit can read them or not."""
    yield Level(place, values, schema)
    for key in _CHILDREN.keys() & schema.model_fields.keys():
        for index, member in _members(key, values.get(key)):
            if isinstance(member, dict):
                yield from levels(member, _CHILDREN[key], f"{place}.{key}{index}".lstrip("."))


def _members(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"[{number}]", member) for number, member in enumerate(value)]
    if isinstance(value, dict) and key == "modules":
        return [(f".{name}", member) for name, member in value.items()]
    return [("", value)]


def unknown_keys(raw: dict[str, Any], file: str, method: MergeMethod | None) -> Iterator[str]:
    """Find keys that MergeKit would ignore without a word."""
    parameters = {p.name for p in method.spec.parameters} if method else set()
    for level in levels(raw):
        known = set(level.schema.model_fields)
        ignored = set() if level.place else {"name"}  # mergekit-multi's
        for key in level.values:
            if key in known | ignored:
                continue
            close = nearest(key, known - set(level.values))
            way = f"write {close} instead" if close else "remove it"
            if key in parameters and "parameters" in known:
                way = "move it under parameters there"
            yield f"{file} has the unknown key {key}{level.at}, which MergeKit ignores; {way}."


def bad_parameters(raw: dict[str, Any], file: str, method: MergeMethod) -> Iterator[str]:
    """Find parameters that the method does not have, or that have values it cannot use."""
    specs = {p.name: p for p in _checked(method)}
    for level in levels(raw):
        settings = level.values.get("parameters")
        for name, setting in settings.items() if isinstance(settings, dict) else ():
            if name not in specs:
                yield (
                    f"{file} sets the parameter {name}{level.at}, which {method.spec.name} does "
                    f"not have and MergeKit ignores; {instead(name, specs)}."
                )
            elif level.is_input and specs[name].scope == ParameterScope.SHARED:
                yield (
                    f"{file} sets the parameter {name}{level.at}, where MergeKit ignores it since "
                    "all models share it; move it to the parameters of the whole merge."
                )
            else:
                for value in _scalars(setting):
                    if complaint := _complaint(specs[name], value):
                        yield f"{file}{level.at}: {complaint}"


def _checked(method: MergeMethod) -> list[ParameterSpec]:
    """Return a method's parameters; a stock method's shares have to be shares as well."""
    specs = {p.name: p for p in method.spec.parameters}
    if isinstance(method, GeneralizedTaskArithmeticMerge):
        for spec in with_priors(method.spec.parameters):
            if spec.name in specs and spec.name != "weight":  # which may be negative there
                specs[spec.name] = spec
    return list(specs.values())


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


def bad_dtypes(config: MergeConfiguration, file: str) -> dict[str, str]:
    """Return a sentence for each dtype that MergeKit would fail on while it merges."""
    return {
        key: f"{file} has the {key} {name}, which cannot be merged in; {instead(name, DTYPES)}."
        for key in ("dtype", "out_dtype")
        if (name := getattr(config, key)) and name.removeprefix("torch.") not in DTYPES
    }


def bad_template(config: MergeConfiguration, file: str) -> Iterator[str]:
    """Find a chat template that MergeKit would fail on after it has merged."""
    template = config.chat_template
    files = importlib.resources.files(chat_templates).iterdir()
    built_in = {Path(f.name).stem for f in files if f.name.endswith(".jinja")} | {"auto"}
    if template and template not in built_in and (len(template) < 20 or "{" not in template):
        yield (
            f"{file} has the chat_template {template!r}, which is neither a template nor one of "
            f"MergeKit's; {instead(template, built_in)}."
        )
