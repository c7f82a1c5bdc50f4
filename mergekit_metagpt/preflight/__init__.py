"""The preflight: whether a merge will work and what it will cost, from headers alone.

Reads configs, the headers of weight files and tokenizers; never a tensor. To add a check,
write a generator of sentences into the file of its subject, and name it here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mergekit.options import MergeOptions

from mergekit_metagpt import register
from mergekit_metagpt.planning.config import ConfigFile, read_config
from mergekit_metagpt.planning.job import Job, alone, with_own_adapters
from mergekit_metagpt.planning.outputs import Outputs, PlannerError
from mergekit_metagpt.preflight import configs, models, output, tensors
from mergekit_metagpt.preflight.costs import Costs, costs
from mergekit_metagpt.wording import BadInputError

__all__ = ["Costs", "Preflight", "ignored", "inspect"]

# In the order in which their sentences are printed. The first that cannot look any further,
# because of a problem, raises it.
_CHECKS: tuple[Callable[[Job], Iterable[str]], ...] = (
    configs.ignored_parameters,
    configs.bad_parameters,
    configs.bad_dtypes,
    configs.bad_template,
    configs.empty_parts,
    models.unusable,
    models.same_models,
    models.different_heads,
    tensors.missing,
    tensors.missing_heads,
    tensors.left_out,
    tensors.different_shapes,
    tensors.quantized,
    tensors.lost,
    tensors.bad_values,
    configs.unused_values,
    models.bad_vocabularies,
)


@dataclass(frozen=True)
class Preflight:
    """What :func:`inspect` returns of a merge that nothing stands against."""

    costs: Costs
    outputs: Outputs | None  # None if MergeKit first has to download a model or apply an adapter
    warnings: list[str]  # what the user should know of; one sentence each


def inspect(
    config: ConfigFile | str, out: str | None = None, options: MergeOptions | None = None
) -> Preflight:
    """Look for everything that a merge would fail on, without reading a tensor.

    MergeKit's own parser and planner are asked in between, and what they say is passed on: the
    checks look for what MergeKit ignores, loses or would fail on later.

    Args:
        config: a merge config, or the path of its file.
        out: the directory that the merge will be written to; None to leave it unchecked.
        options: MergeKit's options.

    Raises:
        BadInputError: with a sentence for each thing that the merge would fail on, or silently do
            wrong.
    """
    register()
    problems: list[str] = []
    try:
        written = read_config(config) if isinstance(config, str) else config
        with alone():
            job = Job(written, options or MergeOptions())
            problems += configs.unknown_keys(job)  # also if MergeKit cannot read the rest
            job.options = with_own_adapters(job.options, job.parsed)
            problems += output.bad_output(job, out) if out else ()
            for check in _CHECKS:
                problems += check(job)
            if not problems:
                total = costs(job)
                problems += output.no_room(job, out, total)
            if not problems:
                final = all(it.weights.directory and not it.to_apply for it in job.models.values())
                warnings = list(models.different_settings(job))
                return Preflight(total, job.outputs if final else None, warnings)
    except PlannerError as error:
        if set(problems) <= set(ignored(job)):  # others may be why
            problems += error.args
    except BadInputError as error:
        problems += error.args
    raise BadInputError(*dict.fromkeys(problems))


def ignored(job: Job) -> list[str]:
    """Return a sentence for each setting of a config that MergeKit ignores."""
    register()
    return [*configs.unknown_keys(job), *configs.ignored_parameters(job)]
