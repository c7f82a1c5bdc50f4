"""The functions of the Python interface, and below them what they share with the commands.

``ray`` is the address of a Ray cluster, empty for the one that is found or else started; None
for this process.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt import preflight
from mergekit_metagpt.api.results import Merged, Plan, Survey
from mergekit_metagpt.measure import loaders
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.merging.record import hub_names
from mergekit_metagpt.merging.whole import merge_whole
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import ConfigFile, plain, read_config, reference
from mergekit_metagpt.planning.forecast import Forecast, forecast, own_method
from mergekit_metagpt.planning.job import Job, running
from mergekit_metagpt.planning.models import find_model_files, require_models
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.report.plots import comparison_figure
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process

LOG = logging.getLogger(__name__)

# The path of a YAML file, or its content.
Config = str | Path | Mapping[str, Any] | MergeConfiguration


def survey(
    base: str | ModelReference,
    experts: Sequence[str | ModelReference],
    *,
    options: MergeOptions | None = None,
) -> Survey:
    """Measure the task vectors of experts, and keep the figures in a small cache.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it: ``model``, ``model@revision`` or
            ``model+lora``.
        experts: θ_t, T models, each given like the base; the survey has their order.
        options: MergeKit's options, such as the device. ``quiet`` hides the progress bar.

    Raises:
        ValueError: if models are missing or cannot be compared, or if a tensor holds NaN or Inf.
            The message names the model and the tensor.
    """
    with running(comparing(base, experts), options or MergeOptions()) as job:
        found = measured(job)
    return replace(found, figures=found.figures.in_order_of(list(map(reference, experts))))


def plan(
    config: Config, *, granularity: str | None = None, options: MergeOptions | None = None
) -> Plan:
    """Return the coefficients that a merge will use; nothing is merged.

    Args:
        config: the path of a merge config, or its content.
        granularity: if given, replaces the config's.
        options: MergeKit's options.

    Raises:
        ValueError: if the merge would refuse the config or its models; says why.
    """
    return Plan(*forecasts(config, options or MergeOptions(), [granularity]))


def merge(config: Config, out: str | Path, *, options: MergeOptions | None = None) -> Merged:
    """Check a merge, then merge into a new directory, which appears whole or not at all.

    If a call stops, what is complete stays beside ``out``, and the same call goes on from it.

    Args:
        config: the path of a merge config, or its content.
        out: the directory to make; must not exist, or be empty.
        options: MergeKit's options. Without a seed, one follows from what is merged.

    Raises:
        ValueError: if the merge has problems; names all of them.
    """
    return merged(config, Path(out), options or MergeOptions())


def _log(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        LOG.warning("%s", sentence)


def forecasts(
    config: Config,
    options: MergeOptions,
    granularities: Sequence[str | None] = (None,),
    *,
    numbers_only: bool = False,
    ray: str | None = None,
    warn: Callable[[Iterable[str]], None] = _log,
) -> list[Forecast]:
    """Return the coefficients that a merge will use.

    There is a forecast for each of the granularities, in place of the config's unless it is
    None; ``numbers_only`` refuses direction. What MergeKit ignores in the config is warned of,
    and a failure is explained by the problems that ``check`` finds.
    """
    with running(_read(config), options) as job:
        known = preflight.ignored(job)
        warn(known)
        try:
            own_method(job.parsed)  # before the hub is asked for anything
            mapper = _ready_to_measure(job, ray)
            settings: Any = {"numbers_only": numbers_only, "progress": job.progress}
            return [
                forecast(job.parsed, job.options, granularity=each, mapper=mapper, **settings)
                for each in granularities
            ]
        except BadInputError:
            raise
        except Exception as error:
            try:
                preflight.inspect(job.config, options=job.options)
            except BadInputError as why:
                if set(why.args) - set(known):
                    raise why from error
            raise


def comparing(base: str | ModelReference, experts: Sequence[str | ModelReference]) -> ConfigFile:
    """Return a config that compares models, named as MergeKit writes them."""
    models = [{"model": reference(model)} for model in experts]
    return _read({"merge_method": "metagpt", "base_model": reference(base), "models": models})


def _read(config: Config) -> ConfigFile:
    """Read a file, or the content of one as if it had been read."""
    if isinstance(config, str | Path):
        return read_config(str(config))
    raw: Any = plain(config)
    if not isinstance(raw, dict):
        raise BadInputError(f"A config is a path, a dictionary or a MergeConfiguration, not {raw}.")
    return ConfigFile("the config", yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), raw)


def measured(job: Job, ray: str | None = None) -> Survey:
    """Return the survey of the base and the experts of a job, with inner products."""
    models = job.parsed.referenced_models()
    require_models([model for model in models if not loaders.is_looked_up(model)], job.options)
    base, experts = job.base_and_experts
    checkpoints = Checkpoints(base, tuple(experts))
    mapper = _ready_to_measure(job, ray)
    SURVEYS.begin(checkpoints)
    settings = (job.options.device or "cpu", job.progress, mapper)
    return Survey(base, SURVEYS.survey_of(checkpoints, *settings, products=True))


def merged(
    config: Config,
    out: Path,
    options: MergeOptions,
    *,
    names: Sequence[str] = (),
    ray: str | None = None,
    warn: Callable[[Iterable[str]], None] = _log,
) -> Merged:
    """Do what :func:`merge` does. ``names`` are PATH=USER/NAME, for paths in the config."""
    written = _read(config)
    found = preflight.inspect(written, str(out), options)
    warn(found.warnings)
    with running(written, options) as job:
        if found.outputs:
            job.outputs = found.outputs
        record = merge_whole(
            job,
            out,
            names=hub_names(written.raw, names),
            draw=_draw if find_spec("matplotlib") else None,
            mapper=None if ray is None else _ray_mapper(ray, job),
        )
        return Merged(out, Summary(job.entries), record)


def _ray_mapper(ray: str, job: Job, on_hub: Sequence[loaders.HubLoader] = ()) -> RayMapper:
    """Return a cluster, whose workers read the models ``on_hub`` from there."""
    on_cuda = torch.device(job.options.device or "cpu").type == "cuda"
    return RayMapper(ray or None, partial(loaders.set_up_worker, job.options, on_hub), int(on_cuda))


def _ready_to_measure(job: Job, ray: str | None) -> Mapper:
    """Say where the models are measured; this job reads those on the hub tensor by tensor.

    Adapters that PEFT would apply in part are refused; if it has done so before, it is silent.
    """
    models = job.parsed.referenced_models()
    adapted = [find_model_files(model, job.options) for model in models if model.lora]
    problems = [p for it in adapted for p in (*it.problems, *bad_adapters(it, job.options))]
    if problems:
        raise BadInputError(*problems)
    try:
        on_hub = loaders.find_on_hub(models, job.options)
    except BadInputError:
        raise
    except Exception:
        require_models(models, job.options)  # says what is wrong
        raise
    return in_this_process if ray is None else _ray_mapper(ray, job, on_hub)


def _draw(path: Path, summary: Summary) -> None:
    comparison_figure([("Coefficients by layer", summary)]).savefig(path)
