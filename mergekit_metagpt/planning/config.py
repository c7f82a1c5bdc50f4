"""Reads merge configs, walks through their parts, and makes MergeKit's choice of a template."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit.common import ModelPath, ModelReference
from mergekit.config import (
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from pydantic import ValidationError

from mergekit_metagpt.measure.vocabularies import load_tokenizer
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.yaml_file import read_yaml
from mergekit_metagpt.wording import BadInputError, nearest, reason

LOG = logging.getLogger(__name__)

# The module of a config, and the number of the slice in it.
Place = tuple[str, int]


@dataclass(frozen=True)
class ConfigFile:
    """A merge config as it was written.

    Attributes:
        name: the path of its file, for messages.
        text: the contents of the file.
        raw: the same as Python objects.
    """

    name: str
    text: str
    raw: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def anchored(self) -> set[str]:
        """The top-level keys under which a YAML anchor is defined, to be used elsewhere."""
        blocks = re.split(r"^(?=\S)", self.text, flags=re.MULTILINE)
        return {b.partition(":")[0].strip("'\" ") for b in blocks if re.search(r"[\s\[{,]&\w", b)}

    def parse(self) -> MergeConfiguration:
        """Return the config as MergeKit reads it.

        Raises:
            BadInputError: with a sentence for each value that MergeKit cannot read.
        """
        try:
            return MergeConfiguration.model_validate(self.raw)
        except ValidationError as error:
            said = {_place(each, self.raw): each["msg"] for each in error.errors()}
            # What is wrong inside a value says more than that the value is wrong.
            inner = [at for at in said if not any(at != it and is_within(it, at) for it in said)]
            raise BadInputError(
                *(f"{self.name} is wrong at {at}: {said[at]}; correct it." for at in inner)
            ) from None
        except (RuntimeError, TypeError) as error:
            raise BadInputError(f"{self.name} is wrong: {reason(error)}; correct it.") from None


def _place(error: Mapping[str, Any], value: Any) -> str:
    """Return where pydantic found an error, without the names of the types that it tried."""
    place, keys = "", list(error["loc"])
    for key in keys:
        known = range(len(value)) if isinstance(value, list) else value
        if isinstance(known, dict | range) and key in known:
            place += f"[{key}]" if isinstance(key, int) else f".{key}"
            value = value[key]
    if error["type"] == "missing":
        named = value if isinstance(value, dict) else ()
        close = nearest(keys[-1], [key for key in named if isinstance(key, str)])
        place += f".{keys[-1]}{f' (it has {close})' if close else ''}"
    return place.lstrip(".")


def is_within(inner: str, outer: str) -> bool:
    """Return whether a place in a config is another one, or is inside it.

    >>> is_within("slices[1].sources[0]", "slices[1]"), is_within("slices[11]", "slices[1]")
    (True, False)
    """
    return inner == outer or not outer or inner.startswith((f"{outer}.", f"{outer}["))


def read_config(file: str) -> ConfigFile:
    """Return the config that a file, or a pipe, holds; ``-`` is standard input.

    Pass on the result, since a pipe can be read only once.

    Raises:
        BadInputError: if it cannot be read, or is not a mapping in which every key is set once.
    """
    text, raw = read_yaml(file)
    if not isinstance(raw, dict):
        raise BadInputError(
            f"Merge config {file} is not a mapping of keys to values; start from one of "
            "example_configs."
        )
    return ConfigFile(file, text, raw)


def reference(model: str | os.PathLike[str] | ModelReference) -> ModelReference:
    """Return the model that is named outside of a config: by any path that exists, or as there.

    Raises:
        BadInputError: if it can be neither.
    """
    model = model if isinstance(model, ModelReference) else os.fspath(model)
    if isinstance(model, str) and os.path.exists(model):
        return ModelReference(model=ModelPath(path=model))
    try:
        return ModelReference.model_validate(model)
    except RuntimeError:
        raise BadInputError(
            f"Model {model} does not exist, and is no MODEL@REVISION+ADAPTER either; correct it."
        ) from None


@dataclass(frozen=True)
class Part:
    """A list of models that a config merges with each other.

    Attributes:
        path: where it is, such as ``slices[0]``.
        place: the module (empty outside of modules), and the number of the slice.
        holder: the object with the list: a slice, or a config or module without slices.
        base: θ_0 there, if there is one.
    """

    path: str
    place: Place
    holder: MergeConfiguration | OutputModuleDefinition | OutputSliceDefinition
    base: ModelReference | None

    @property
    def inputs(self) -> list[Any]:
        """The entries of the list itself."""
        return getattr(self.holder, "sources" if self._is_slice else "models")  # type: ignore[no-any-return]

    def holds(self, place: Place) -> bool:
        """Return whether the models are merged at a place.

        MergeKit's planner puts tensors in modules even if the config has none. A part without a
        module therefore matches every module.
        """
        module, number = self.place
        everywhere = not (module or self._is_slice)
        return everywhere or (place[1] == number and module in ("", place[0]))

    @property
    def _is_slice(self) -> bool:
        return isinstance(self.holder, OutputSliceDefinition)


def parts(config: MergeConfiguration) -> Iterator[Part]:
    """Yield the parts of a config and of its modules."""
    holders: dict[str, MergeConfiguration | OutputModuleDefinition] = {"": config}
    holders |= config.modules or {}
    for module, holder in holders.items():
        prefix = f"modules.{module}." if module else ""
        if holder.models:
            yield Part(f"{prefix}models", (module, 0), holder, config.base_model)
        for number, piece in enumerate(holder.slices or []):
            base = piece.base_model or config.base_model
            yield Part(f"{prefix}slices[{number}]", (module, number), piece, base)


def base_and_experts(config: MergeConfiguration) -> tuple[ModelReference, list[ModelReference]]:
    """Return the base and the experts of a config, in canonical order.

    Raises:
        BadInputError: if there is not one base, or no expert.
    """
    bases = {config.base_model, *(part.base for part in parts(config))} - {None}
    if len(bases) != 1:
        raise BadInputError(
            "Task vectors start at one base, but the merge config names "
            f"{'several' if bases else 'none'}; set base_model."
        )
    (base,) = bases
    assert base is not None
    experts = canonical(set(config.referenced_models()) - {base})
    if not experts:
        raise BadInputError("The merge config names no model beside the base; add the experts.")
    return base, experts


def parameter_sets(config: MergeConfiguration) -> list[dict[str, Any]]:
    """Return every ``parameters`` mapping of a config; some of them twice."""
    holders: list[Any] = [config, *(config.modules or {}).values()]
    for part in parts(config):
        holders += [part.holder, *part.inputs]
    return [holder.parameters for holder in holders if holder.parameters is not None]


class Tie(NamedTuple):
    """The first of several templates that models have equally often, and what to say of it."""

    template: str
    note: str


def most_frequent(config: MergeConfiguration) -> Tie | None:
    """Return the first of the most frequent templates, if MergeKit would choose one by chance.

    MergeKit asks the models in the order of a set. The order here is that of the config, the base
    first.
    """
    if config.chat_template != "auto":
        return None
    base = [config.base_model] if config.base_model else []
    models = dict.fromkeys([*base, *(it.model for part in parts(config) for it in part.inputs)])
    found = {model: template for model in models if (template := _template(model))}
    counts = Counter(found.values())
    tied = [model for model in found if counts[found[model]] == max(counts.values())]
    different = len({found[model] for model in tied})
    # MergeKit would take any other for a name.
    model = next((it for it in tied if len(found[it]) >= 20 and "{" in found[it]), None)
    if different < 2 or model is None:
        return None
    return Tie(
        found[model],
        f"chat_template: auto takes the most frequent template, but {different} are equally "
        f"frequent; this package takes that of {model}, and mergekit-yaml any of them by "
        "chance. To choose, set chat_template to one of MergeKit's names, or to a template.",
    )


def with_chosen_template(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config of which MergeKit chooses no chat template by chance; warn of a choice."""
    if tie := most_frequent(config):
        LOG.warning("%s", tie.note)
        return config.model_copy(update={"chat_template": tie.template})
    return config


def _template(model: ModelReference) -> str | None:
    """Return a model's chat template as MergeKit finds it."""
    try:
        tokenizer = load_tokenizer(model, None, trust_remote_code=False)
    except BadInputError as error:  # MergeKit goes on, too
        LOG.info("%s", error)
        return None
    template = tokenizer and tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if template else None
