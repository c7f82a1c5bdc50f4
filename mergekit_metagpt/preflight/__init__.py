"""The preflight: whether a merge will work and what it will cost, from headers alone.

Reads configs, the headers of weight files and tokenizers; never a tensor. To add a check,
write a generator of sentences into the file of its subject, and call it from here.
"""

from dataclasses import dataclass, field, replace

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions

from mergekit_metagpt import register
from mergekit_metagpt.planning.chat_template import most_frequent
from mergekit_metagpt.planning.config import ConfigFile, read_config
from mergekit_metagpt.planning.job import alone, with_own_adapters
from mergekit_metagpt.planning.models import ModelFiles, find_model_files
from mergekit_metagpt.planning.outputs import Outputs, PlannerError, output_rows, plan_outputs
from mergekit_metagpt.preflight import computation, configs, structure, tensors
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.preflight.costs import Costs, costs
from mergekit_metagpt.preflight.lost import lost
from mergekit_metagpt.preflight.output import bad_output, no_room
from mergekit_metagpt.preflight.unused import idle_coefficients, idle_filters
from mergekit_metagpt.preflight.vocabularies import bad_tokenizers, bad_tokens, old_source
from mergekit_metagpt.wording import BadInputError, instead, nearest

# A metagpt method adds to each stock method, but plain task arithmetic is metagpt itself.
_MEANT = {"metagpt_task_arithmetic": "metagpt", "metagpt_linear": "metagpt"}

__all__ = ["Costs", "Preflight", "ignored", "inspect"]


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        problems: what the merge would fail on, or silently do wrong; one sentence each.
        costs: what the merge will cost; None if there are problems.
        outputs: what the merge will write; None if there are problems, or if MergeKit first has
            to download a model or to apply an adapter.
        warnings: what the user should know of, though it can be merged; one sentence each.
    """

    problems: list[str]
    costs: Costs | None = None
    outputs: Outputs | None = None
    warnings: list[str] = field(default_factory=list)


def inspect(
    config: ConfigFile | str, out: str | None = None, options: MergeOptions | None = None
) -> Preflight:
    """Look for everything that a merge would fail on, without reading a tensor.

    Args:
        config: a merge config, or the path of its file.
        out: the directory that the merge will be written to; None to leave it unchecked.
        options: MergeKit's options.

    Returns:
        All problems; if there are none, what the merge will cost and write.
    """
    register()
    try:
        written = read_config(config) if isinstance(config, str) else config
    except BadInputError as error:
        return Preflight(list(error.args))
    inspection = _Inspection(written, out, options or MergeOptions())
    try:
        with alone():
            inspection.run()
    except BadInputError as error:
        inspection.problems += error.args
    problems = list(dict.fromkeys(inspection.problems))
    return Preflight(problems) if problems else inspection.findings()


def ignored(config: ConfigFile) -> list[str]:
    """Return a sentence for each setting of a config that MergeKit ignores."""
    register()
    inspection = _Inspection(config, None, MergeOptions())
    return list(configs.ignored(config, inspection.method()))


@dataclass
class _Inspection:
    """One look at a merge: its config, then the models, then their tensors side by side."""

    written: ConfigFile
    out: str | None
    options: MergeOptions
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    models: dict[ModelReference, ModelFiles] = field(default_factory=dict)
    costs: Costs | None = None
    outputs: Outputs | None = None

    @property
    def file(self) -> str:
        return self.written.name

    def run(self) -> None:
        self.problems += configs.no_accelerator(self.options)
        config = self._look_at_config()
        self.options = with_own_adapters(self.options, config)
        self._look_at_models(config)
        if self.out is not None:
            self.problems += bad_output(self.out, self.models)
        if bad_layers := list(structure.bad_layers(config, self.file, self.models)):
            self.problems += bad_layers
            return
        self.outputs = self._plan(config)
        if self.outputs:
            self.costs = self._look_at_tensors(self.outputs, config)

    def findings(self) -> Preflight:
        """Return what was found, if there are no problems."""
        are_final = all(f.weights.directory and not f.to_apply for f in self.models.values())
        return Preflight([], self.costs, self.outputs if are_final else None, self.warnings)

    def _look_at_config(self) -> MergeConfiguration:
        written = self.written
        method = self.method()
        self.problems += configs.ignored(written, method)
        if method is not None:
            self.problems += configs.bad_parameters(written.raw, self.file, method)
        config = written.parse()
        bad_dtypes = configs.bad_dtypes(config, self.file)
        self.problems += bad_dtypes.values()
        config = config.model_copy(update=dict.fromkeys(bad_dtypes))
        if old := list(old_source(config, self.file)):
            self.problems += old
            config = config.model_copy(update={"tokenizer": None, "tokenizer_source": None})
        self.problems += configs.bad_template(config, self.file)
        if method is not None:
            self.problems += structure.bad_structure(config, self.file, method)
        return config

    def method(self) -> MergeMethod | None:
        """Return the method that the config names, or most likely means."""
        methods = {method.spec.name: method for method in merge_methods.registered_methods()}
        name = self.written.raw.get("merge_method")
        if not isinstance(name, str):
            return None  # the config's parser reports it
        if name in methods:
            return methods[name]
        meant = _MEANT.get(name.lower(), name.lower())
        way = f"write {meant} instead" if meant in methods else instead(meant, methods)
        self.problems.append(
            f"{self.file} has the merge_method {name}, which MergeKit does not know; {way}."
        )
        return methods.get(nearest(meant, methods) or "")

    def _look_at_models(self, config: MergeConfiguration) -> None:
        for model in sorted(config.referenced_models(), key=str):
            self.models[model] = find_model_files(model, self.options)
        found = list(self.models.values())
        for files in found:
            self.problems += files.problems
            self.problems += bad_adapters(files, self.options)
        self.problems += structure.same_models(config.base_model, found)
        self.problems += structure.different_depths(config, self.models)
        self.problems += computation.different_heads(config.base_model, found)
        self.warnings += computation.different_settings(config.base_model, found)
        if not self.options.allow_crimes:
            self.problems += structure.different_architectures(config.base_model, found)

    def _plan(self, config: MergeConfiguration) -> Outputs | None:
        """Plan the merge.

        If it has problems and cannot be planned, plan a plain merge of the models that could be
        read, so that their tensors are checked too.
        """
        attempts = [config]
        if self.problems and config.models and config.base_model:
            known = [m.model for m in config.models if self.models[m.model].config]
            models = [InputModelDefinition(model=model) for model in dict.fromkeys(known)]
            changes = {"merge_method": "metagpt", "parameters": None, "models": models}
            attempts.append(config.model_copy(update=changes))
        for attempt in attempts:
            try:
                return plan_outputs(attempt, self.options, self.models, self.file)
            except PlannerError:
                if not self.problems:
                    raise
        return None  # the problems say why

    def _look_at_tensors(self, outputs: Outputs, config: MergeConfiguration) -> Costs:
        base, file = config.base_model, self.file
        self.problems += tensors.missing(outputs, base, self.models)
        self.problems += tensors.missing_heads(outputs, self.models)
        self.problems += tensors.left_out(outputs, file)
        self.problems += tensors.different_shapes(outputs, base, file)
        self.problems += tensors.quantized(outputs)
        self.problems += lost(outputs, base, self.models)
        self.problems += tensors.bad_values(outputs, file)
        broken = list(bad_tokenizers(outputs, base, self.options, file))
        self.problems += broken
        self.problems += idle_filters(self.written.raw, file, config, outputs)
        rows = None if broken else output_rows(outputs, config.tokenizer, file)
        if rows is not None:
            self.problems += bad_tokens(outputs, base, config, file)
        total = costs(outputs, config, self.options, self.models, rows)
        self.problems += no_room(total, self.out, self.written, self.models)
        notes = [*total.notes, *idle_coefficients(self.written.raw, outputs)]
        if tie := most_frequent(config):
            notes.append(tie.note)
        return replace(total, notes=tuple(notes))
