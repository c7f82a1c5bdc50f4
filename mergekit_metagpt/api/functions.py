"""The functions of the Python interface; the commands of the same names do the same."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt import register
from mergekit_metagpt.api.calls import comparing, forecasts, measured, merged, written
from mergekit_metagpt.api.results import Merged, Plan, Survey
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import ConfigFile, read_config, reference
from mergekit_metagpt.planning.job import running
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.wording import BadInputError

LOG = logging.getLogger(__name__)

# The path of a YAML file, or its content.
Config = str | Path | Mapping[str, Any] | MergeConfiguration


def survey(
    base: str | ModelReference,
    experts: Sequence[str | ModelReference],
    *,
    options: MergeOptions | None = None,
) -> Survey:
    """Measure the task vectors of experts.

    A small cache keeps the figures, so merges and plans of the same models, of this process or a
    later one, do not measure them again. Models on the hub are read tensor by tensor, and not
    stored.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it: ``model``, ``model@revision`` or
            ``model+lora``.
        experts: θ_t, T models, each given like the base.
        options: MergeKit's options, such as the device. ``quiet`` hides the progress bar.

    Returns:
        The survey, with the experts in the given order.

    Raises:
        ValueError: if models are missing or cannot be compared, or if a tensor holds NaN or Inf.
            The message names the model and the tensor.
    """
    options = options or MergeOptions()
    with running(comparing(base, experts), options, not options.quiet) as job:
        figures = measured(job).in_order_of(list(map(reference, experts)))
        return Survey(job.base_and_experts[0], figures)


def plan(
    config: Config,
    *,
    granularity: str | None = None,
    options: MergeOptions | None = None,
) -> Plan:
    """Return the coefficients that a merge will use; nothing is merged.

    Args:
        config: the path of a merge config, or its content.
        granularity: if given, replaces the config's.
        options: MergeKit's options.

    Raises:
        ValueError: if the merge would refuse the config or its models; says why.
    """
    register()
    options = options or MergeOptions()
    with running(_read(config), options, not options.quiet) as job:
        (foreseen,) = forecasts(job, [granularity], warn=_log)
    return Plan(foreseen)


def merge(
    config: Config,
    out: str | Path,
    *,
    options: MergeOptions | None = None,
) -> Merged:
    """Check a merge, then merge into a new directory, which appears whole or not at all.

    If a call stops, what is complete stays beside ``out``, and the same call goes on from it.

    Args:
        config: the path of a merge config, or its content.
        out: the directory to make; must not exist, or be empty.
        options: MergeKit's options. Without a seed, one follows from what is merged.

    Raises:
        ValueError: if the merge has problems; names all of them.
    """
    file, options = _read(config), options or MergeOptions()
    looked_at = inspect(file, str(out), options)
    if looked_at.problems:
        raise BadInputError(*looked_at.problems)
    _log(looked_at.warnings)
    with running(file, options, not options.quiet) as job:
        record = merged(job, Path(out), outputs=looked_at.outputs)
        return Merged(Path(out), Summary(job.entries), record)


def _read(config: Config) -> ConfigFile:
    return read_config(str(config)) if isinstance(config, str | Path) else written(config)


def _log(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        LOG.warning("%s", sentence)
