"""The merge that the checks look at."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions

from mergekit_metagpt.planning.config import ConfigFile
from mergekit_metagpt.planning.job import with_own_adapters
from mergekit_metagpt.planning.models import ModelFiles, find_model_files
from mergekit_metagpt.planning.outputs import Outputs, output_rows, plan_outputs


@dataclass(frozen=True)
class Case:
    """One merge. What cannot be found of it, because of a problem, raises a BadInputError."""

    written: ConfigFile
    given: MergeOptions
    out: str | None = None  # the directory that it will be written to, if that is known

    @property
    def file(self) -> str:
        """The path of the config, for messages."""
        return self.written.name

    @property
    def raw(self) -> dict[str, Any]:
        """The config as Python objects."""
        return self.written.raw

    @cached_property
    def config(self) -> MergeConfiguration:
        """The config as MergeKit reads it."""
        return self.written.parse()

    @property
    def base(self) -> ModelReference | None:
        """θ_0."""
        return self.config.base_model

    @cached_property
    def method(self) -> MergeMethod | None:
        """The method that the config names; None if MergeKit does not know it."""
        methods = {method.spec.name: method for method in merge_methods.registered_methods()}
        return methods.get(str(self.raw.get("merge_method")))

    @cached_property
    def options(self) -> MergeOptions:
        """MergeKit's options, with a LoRA cache that belongs to these adapters."""
        return with_own_adapters(self.given, self.config)

    @cached_property
    def models(self) -> dict[ModelReference, ModelFiles]:
        """The models that the config names, the base first."""
        named = sorted(self.config.referenced_models(), key=lambda it: (it != self.base, str(it)))
        return {model: find_model_files(model, self.options) for model in named}

    @cached_property
    def outputs(self) -> Outputs:
        """What the merge will write."""
        return plan_outputs(self.config, self.options, self.models, self.file)

    @cached_property
    def rows(self) -> int | None:
        """How many tokens the output will have; None if they stay as they are."""
        return output_rows(self.outputs, self.config.tokenizer, self.file)
