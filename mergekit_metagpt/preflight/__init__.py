"""The preflight: whether a merge will work and what it will cost, from headers alone.

Reads configs, the headers of weight files and tokenizers; never a tensor.
"""

from dataclasses import dataclass, field
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions

from mergekit_metagpt.methods import register
from mergekit_metagpt.preflight import configs, tensors
from mergekit_metagpt.preflight.costs import Costs, costs
from mergekit_metagpt.preflight.models import Checkpoint, open_checkpoint, same_models
from mergekit_metagpt.preflight.output import bad_output, no_room
from mergekit_metagpt.preflight.planned import (
    MergePlan,
    PlannerError,
    different_architectures,
    plan_merge,
)
from mergekit_metagpt.preflight.structure import bad_structure
from mergekit_metagpt.preflight.vocabularies import different_tokenizers, output_rows
from mergekit_metagpt.preflight.wording import PreflightError, instead, nearest

__all__ = ["Costs", "Preflight", "inspect"]


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        problems: what the merge would fail on, or do wrong without a word; one sentence each.
        plan: what the merge will cost; None if there are problems.
    """

    problems: list[str]
    plan: Costs | None = None


def inspect(file: str, out: str | None = None, options: MergeOptions | None = None) -> Preflight:
    """Look for everything that a merge would fail on, without reading a tensor.

    Args:
        file: the path of a merge config.
        out: the directory that the merge will be written to, if that is to be checked.
        options: MergeKit's options.

    Returns:
        All problems, or the plan of a merge that has none.
    """
    register()
    inspection = _Inspection(file, out, options or MergeOptions())
    plan = None
    try:
        plan = inspection.run()
    except PreflightError as error:
        inspection.problems += error.args
    problems = list(dict.fromkeys(inspection.problems))
    return Preflight(problems, None if problems else plan)


@dataclass
class _Inspection:
    """One look at a merge: its config, then the models, then their tensors side by side."""

    file: str
    out: str | None
    options: MergeOptions
    problems: list[str] = field(default_factory=list)
    checkpoints: dict[ModelReference, Checkpoint] = field(default_factory=dict)

    def run(self) -> Costs | None:
        config = self._look_at_config(configs.read_yaml(self.file))
        self._look_at_models(config)
        if self.out is not None:
            self.problems += bad_output(self.out, self.checkpoints)
        plan = self._plan(config)
        return self._look_at_tensors(plan, config) if plan else None

    def _look_at_config(self, raw: dict[str, Any]) -> MergeConfiguration:
        method = self._method(raw)
        self.problems += configs.unknown_keys(raw, self.file, method)
        if method is not None:
            self.problems += configs.bad_parameters(raw, self.file, method)
        config = configs.parse(raw, self.file)
        bad_dtypes = configs.bad_dtypes(config, self.file)
        self.problems += bad_dtypes.values()
        config = config.model_copy(update=dict.fromkeys(bad_dtypes))
        self.problems += configs.bad_template(config, self.file)
        if method is not None:
            self.problems += bad_structure(config, self.file, method)
        return config

    def _method(self, raw: dict[str, Any]) -> MergeMethod | None:
        """Return the method that the config names, or most likely means."""
        methods = {method.spec.name: method for method in merge_methods.registered_methods()}
        name = raw.get("merge_method")
        if not isinstance(name, str):
            return None  # as the config's parser will say
        if name not in methods:
            self.problems.append(
                f"{self.file} has the merge_method {name}, which MergeKit does not know; "
                f"{instead(name, methods)}."
            )
        return methods.get(name) or methods.get(nearest(name, methods) or "")

    def _look_at_models(self, config: MergeConfiguration) -> None:
        for model in sorted(config.referenced_models(), key=str):
            self.checkpoints[model] = open_checkpoint(model, self.options)
        found = list(self.checkpoints.values())
        for checkpoint in found:
            self.problems += checkpoint.problems
        self.problems += same_models(config.base_model, found)
        if not self.options.allow_crimes:
            self.problems += different_architectures(config.base_model, found)

    def _plan(self, config: MergeConfiguration) -> MergePlan | None:
        """Plan the merge; where it has problems already, else a plain one of its sound models."""
        attempts = [config]
        if self.problems and config.models and config.base_model:
            known = [m.model for m in config.models if self.checkpoints[m.model].config]
            models = [InputModelDefinition(model=model) for model in dict.fromkeys(known)]
            changes = {"merge_method": "metagpt", "parameters": None, "models": models}
            attempts.append(config.model_copy(update=changes))
        for attempt in attempts:
            try:
                return plan_merge(attempt, self.options, self.checkpoints, self.file)
            except PlannerError:
                if not self.problems:
                    raise
        return None  # for a reason that is among the problems

    def _look_at_tensors(self, plan: MergePlan, config: MergeConfiguration) -> Costs:
        base, file = config.base_model, self.file
        self.problems += tensors.missing(plan, base, self.checkpoints)
        self.problems += tensors.different_shapes(plan, base, file)
        self.problems += tensors.quantized(plan)
        self.problems += tensors.lost(plan, base, self.checkpoints)
        self.problems += tensors.bad_values(plan, file)
        self.problems += different_tokenizers(plan, base, self.options, file)
        rows = output_rows(plan, config.tokenizer, file)
        total = costs(plan, config, self.options, self.checkpoints, rows)
        self.problems += no_room(total, self.out, self.checkpoints)
        return total
