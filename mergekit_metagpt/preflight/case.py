"""The merge that the checks look at."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions

from mergekit_metagpt.planning.config import ConfigFile
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.outputs import Outputs, output_rows


@dataclass
class Case:
    """One merge, step by step: a check may use what is known by its step.

    Attributes:
        written: the config as it was written.
        options: MergeKit's options.
        out: the directory that it will be written to, if that is known.
        config: the config as MergeKit reads it.
        models: the models that it names, the base first.
        outputs: what it will write.
    """

    written: ConfigFile
    options: MergeOptions
    out: str | None = None
    config: MergeConfiguration = field(init=False)
    models: dict[ModelReference, ModelFiles] = field(init=False)
    outputs: Outputs = field(init=False)

    @property
    def file(self) -> str:
        """The path of the config, for messages."""
        return self.written.name

    @property
    def raw(self) -> dict[str, Any]:
        """The config as Python objects."""
        return self.written.raw

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
    def rows(self) -> int | None:
        """How many tokens the output will have; None if they stay as they are."""
        return output_rows(self.outputs, self.config.tokenizer, self.file)
