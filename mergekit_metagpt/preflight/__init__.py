"""The preflight: whether a merge will work and what it will cost, from headers alone.

Reads configs, the headers of weight files and tokenizers; never a tensor. To add a check,
write a generator of sentences into the file of its subject, and name it here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from mergekit.options import MergeOptions

from mergekit_metagpt import register
from mergekit_metagpt.planning.config import ConfigFile, read_config
from mergekit_metagpt.planning.job import alone, with_own_adapters
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.planning.outputs import Outputs, PlannerError, plan_outputs
from mergekit_metagpt.preflight import configs, models, output, structure, tensors, unused
from mergekit_metagpt.preflight.case import Case
from mergekit_metagpt.preflight.costs import Costs, costs
from mergekit_metagpt.preflight.lost import lost
from mergekit_metagpt.preflight.vocabularies import bad_vocabularies
from mergekit_metagpt.wording import BadInputError

__all__ = ["Costs", "Preflight", "ignored", "inspect"]

Check = Callable[[Case], Iterable[str]]
# The checks of each step, in the order in which their sentences are printed.
_OF_WHAT_IS_IGNORED: list[Check] = [
    configs.unknown_keys,
    configs.ignored_parameters,
    unused.hidden_values,
]
_OF_THE_CONFIG: list[Check] = [
    configs.bad_dtypes,
    configs.bad_template,
    structure.no_experts,
]
_OF_THE_MODELS: list[Check] = [
    models.unusable,
    models.same_models,
    models.different_heads,
    output.bad_output,
]
_OF_THE_TENSORS: list[Check] = [
    tensors.missing,
    tensors.missing_heads,
    tensors.left_out,
    tensors.different_shapes,
    tensors.quantized,
    lost,
    tensors.bad_values,
    unused.idle_filters,
    bad_vocabularies,
]


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
    problems: list[str] = []
    found = Preflight(problems)
    try:
        written = read_config(config) if isinstance(config, str) else config
        with alone():
            found = _look(Case(written, options or MergeOptions(), out), problems)
    except BadInputError as error:
        problems += error.args
    return replace(found, problems=list(dict.fromkeys(problems)))


def ignored(config: ConfigFile) -> list[str]:
    """Return a sentence for each setting of a config that MergeKit ignores."""
    register()
    return list(_found(Case(config, MergeOptions()), _OF_WHAT_IS_IGNORED))


def _found(case: Case, checks: Iterable[Check]) -> Iterator[str]:
    return chain.from_iterable(check(case) for check in checks)


def _look(case: Case, problems: list[str]) -> Preflight:
    """Look at the config, then at the models, then at their tensors side by side.

    MergeKit's own parser and planner are asked in between, and what they say is passed on: the
    checks look for what MergeKit ignores, loses or would fail on later.
    """
    problems += _found(case, [*_OF_WHAT_IS_IGNORED, configs.bad_parameters])
    case.config = case.written.parse()
    problems += _found(case, _OF_THE_CONFIG)
    case.options = with_own_adapters(case.options, case.config)
    named = sorted(case.config.referenced_models(), key=lambda it: (it != case.base, str(it)))
    case.models = {model: find_model_files(model, case.options) for model in named}
    problems += _found(case, _OF_THE_MODELS)
    if bad_layers := list(structure.no_layers(case)):
        problems += bad_layers
        return Preflight(problems)
    try:
        case.outputs = plan_outputs(case.config, case.options, case.models, case.file)
    except PlannerError:
        if problems:  # which may be why
            return Preflight(problems)
        raise
    problems += _found(case, _OF_THE_TENSORS)
    if problems:
        return Preflight(problems)
    total = costs(case)
    problems += output.no_room(case, total)
    if problems:
        return Preflight(problems)
    are_final = all(f.weights.directory and not f.to_apply for f in case.models.values())
    warnings = list(models.different_settings(case))
    return Preflight([], total, case.outputs if are_final else None, warnings)
