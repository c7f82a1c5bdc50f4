"""Surveys as files: measure once, decide often."""

import json
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from pydantic import BaseModel, ValidationError, model_validator

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.fingerprints import described
from mergekit_metagpt.wording import BadInputError, reason

# Of survey files and of metagpt.json, which describe models in the same way.
SCHEMA = 1


class _File(BaseModel):
    """A weight file; see :func:`mergekit_metagpt.planning.fingerprints.fingerprint`."""

    name: str
    bytes: int
    fingerprint: str


class _Model(BaseModel):
    """A model that was measured."""

    model: str
    revision: str | None = None
    files: list[_File]

    def is_same(self, other: "_Model") -> bool:
        """Return whether two models have the same weights, wherever they are."""
        contents = [sorted(file.fingerprint for file in it.files) for it in (self, other)]
        if all(contents):
            return contents[0] == contents[1]
        # One of them was read from the hub, which sends no whole files.
        return self.revision is not None and self.revision == other.revision


class _Tensor(BaseModel):
    """The task vectors of one tensor."""

    dtype: str
    size: int
    squared_norms: list[float]
    products: list[list[float]]
    base: float | None = None  # older files have none


class SurveyFile(BaseModel):
    """The content of a survey file.

    Attributes:
        schema_version: of this layout.
        base: θ_0, as it was named.
        experts: T experts, as they were named.
        inputs: the base and the experts, as in metagpt.json.
        tensors: T squared norms and T x T inner products of task vectors for each tensor, in the
            order of ``experts``; the base's squared norm; the dtype that the stored tensors
            promote to, and the number of elements.
        tied: maps tied tensors to the one that is listed.
        left_out: vocabulary tensors that could not be compared.
    """

    schema_version: Literal[1]
    base: str
    experts: list[str]
    inputs: list[_Model]
    tensors: dict[str, _Tensor]
    tied: dict[str, str]
    left_out: list[str]

    @model_validator(mode="after")
    def _is_whole(self) -> "SurveyFile":
        named = {model.model for model in self.inputs}
        if missing := {self.base, *self.experts} - named:
            raise ValueError(f"inputs lacks {missing.pop()}")
        count = len(self.experts)
        for name, tensor in self.tensors.items():
            rows: list[Sized] = [tensor.squared_norms, tensor.products, *tensor.products]
            if any(len(row) != count for row in rows):
                raise ValueError(f"tensor {name} has figures for other than {count} experts")
            if not isinstance(getattr(torch, tensor.dtype, None), torch.dtype):
                raise ValueError(f"tensor {name} has no dtype {tensor.dtype}")
        return self


def survey_as_text(survey: Survey, base: ModelReference) -> str:
    """Return the content of a survey file.

    Args:
        survey: of whole models, with inner products.
        base: θ_0.
    """
    experts: Sequence[Any] = survey.experts
    products = survey.grams or {}
    content = {
        "schema_version": SCHEMA,
        "base": str(base),
        "experts": list(map(str, experts)),
        "inputs": [described(model) for model in (base, *experts)],
        "tensors": {
            name: {
                "dtype": str(survey.dtypes[name]).removeprefix("torch."),
                "size": survey.sizes[name],
                "squared_norms": norms,
                "products": products[name],
                "base": survey.bases.get(name),
            }
            for name, norms in survey.squared_norms.items()
        },
        "tied": survey.tied,
        "left_out": survey.left_out,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_survey(path: str) -> SurveyFile:
    """Read a survey file.

    Raises:
        BadInputError: if it cannot be used; names the file.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if content["schema_version"] > SCHEMA:
            raise BadInputError(
                f"Survey {path} was written by a newer mergekit-metagpt; update this one, or take "
                "the survey again."
            )
        return SurveyFile.model_validate(content)
    except BadInputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, ValidationError) as error:
        raise BadInputError(
            f"{path} is not a survey ({reason(error)}); write one with mergekit-metagpt survey."
        ) from None


def surveyed(
    path: str, base: ModelReference, experts: Iterable[ModelReference], options: MergeOptions
) -> tuple[Checkpoints, Survey]:
    """Return the survey of models from a file that was taken of them, and perhaps of others.

    Models are recognized by what their weight files hold, so they may have been moved.

    Args:
        path: the survey file.
        base: θ_0.
        experts: θ_t, T models.
        options: MergeKit's options.

    Raises:
        BadInputError: if the file is not a survey, or does not describe these models as they are
            now.
    """
    found = read_survey(path)
    LoaderCache().setup(options)
    checkpoints = Checkpoints(base, tuple(canonical(set(experts))))
    by_name = {model.model: model for model in found.inputs}
    records = [by_name[name] for name in found.experts]
    _require_same(path, base, [by_name[found.base]])
    places = [_require_same(path, expert, records) for expert in checkpoints.experts]
    survey = _survey(found).of_some(places)
    if survey is None:
        raise BadInputError(
            f"Survey {path} measured more experts, of which one has another vocabulary or untied "
            "embeddings, so it says too little about these; take a survey of these alone."
        )
    return checkpoints, replace(survey, experts=checkpoints.experts, source=checkpoints)


def _survey(found: SurveyFile) -> Survey:
    """Return the survey of a file, with places in ``found.experts`` as the experts' ids."""
    tensors = found.tensors.items()
    return Survey(
        tuple(range(len(found.experts))),
        squared_norms={name: tuple(tensor.squared_norms) for name, tensor in tensors},
        tied=found.tied,
        dtypes={name: getattr(torch, tensor.dtype) for name, tensor in tensors},
        left_out=tuple(found.left_out),
        sizes={name: tensor.size for name, tensor in tensors},
        grams={name: tensor.products for name, tensor in tensors},
        bases={name: tensor.base for name, tensor in tensors if tensor.base is not None},
    )


def _require_same(path: str, model: ModelReference, records: Sequence[_Model]) -> int:
    """Return the place of the record of a model, as its files are now."""
    now = _Model.model_validate(described(model))
    for place, record in enumerate(records):
        if record.is_same(now):
            return place
    for record in records:
        if record.model == now.model:
            before = {file.fingerprint for file in record.files}
            changed = next((f.name for f in now.files if f.fingerprint not in before), "")
            what = f"Weight file {changed} of {model}" if changed else f"Model {model}"
            raise BadInputError(
                f"{what} has changed since survey {path} was taken; take the survey again."
            )
    names = ", ".join(record.model for record in records)
    raise BadInputError(
        f"Survey {path} has no model with the weights of {model}; it was taken of {names}. Take "
        "a survey with this model."
    )
