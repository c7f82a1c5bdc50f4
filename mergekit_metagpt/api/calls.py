"""What the commands and the Python functions share: all but their arguments and reports.

``ray`` is the address of a Ray cluster, empty for the one that is found or else started; None
for this process.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.loaders import (
    HubLoader,
    find_on_hub,
    is_looked_up,
    open_on_hub,
    set_up_worker,
)
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.merging.record import hub_names
from mergekit_metagpt.merging.whole import merge_whole
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import ConfigFile, reference
from mergekit_metagpt.planning.forecast import Forecast, forecast, own_method
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.models import find_model_files, require_models
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.planning.yaml_file import plain
from mergekit_metagpt.preflight import ignored, inspect
from mergekit_metagpt.preflight.adapters import bad_adapters
from mergekit_metagpt.report.plots import comparison_figure
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process


def forecasts(
    job: Job,
    granularities: Sequence[str | None],
    *,
    numbers_only: bool = False,
    ray: str | None = None,
    warn: Callable[[Iterable[str]], None],
) -> list[Forecast]:
    """Return the coefficients that a merge will use.

    There is a forecast for each of the granularities, in place of the config's unless it is
    None; ``numbers_only`` refuses direction. What MergeKit ignores in the config is warned of,
    and a failure is explained by the problems that ``check`` finds.
    """
    known = ignored(job.config)
    warn(known)
    try:
        own_method(job.parsed)  # before the hub is asked for anything
        mapper = _ready_to_measure(job, ray)
        return [
            forecast(
                job.parsed,
                job.options,
                granularity=granularity,
                numbers_only=numbers_only,
                progress=job.progress,
                mapper=mapper,
            )
            for granularity in granularities
        ]
    except BadInputError:
        raise
    except Exception as error:
        problems = inspect(job.config, options=job.options).problems
        if set(problems) - set(known):
            raise BadInputError(*problems) from error
        raise


def comparing(base: str | ModelReference, experts: Sequence[str | ModelReference]) -> ConfigFile:
    """Return a config that compares models, named as MergeKit writes them."""
    models = [{"model": reference(model)} for model in experts]
    its = {"merge_method": "metagpt", "base_model": reference(base), "models": models}
    return written(its, "the command")


def written(config: Any, name: str = "the config") -> ConfigFile:
    """Return the content of a config as if it had been read from a file."""
    raw = plain(config)
    return ConfigFile(name, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), raw)


def measured(job: Job, ray: str | None = None) -> Survey:
    """Return the survey of the base and the experts of a job, with inner products."""
    models = job.parsed.referenced_models()
    require_models([model for model in models if not is_looked_up(model)], job.options)
    base, experts = job.base_and_experts
    checkpoints = Checkpoints(base, tuple(experts))
    mapper = _ready_to_measure(job, ray)
    SURVEYS.begin(checkpoints)
    device = job.options.device or "cpu"
    return SURVEYS.survey_of(checkpoints, device, job.progress, mapper, products=True)


def merged(
    job: Job,
    out: Path,
    *,
    names: Sequence[str] = (),
    outputs: Outputs | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Merge a job without problems into a new directory, and return the record.

    ``names`` are PATH=USER/NAME, for paths in the config. ``job.entries`` then says how each
    tensor was merged.
    """
    return merge_whole(
        job,
        out,
        names=hub_names(job.config.raw, names),
        draw=_draw if find_spec("matplotlib") else None,
        outputs=outputs,
        mapper=None if ray is None else _ray_mapper(ray, job),
    )


def _ray_mapper(ray: str, job: Job, on_hub: Sequence[HubLoader] = ()) -> RayMapper:
    """Return a cluster, whose workers read the models ``on_hub`` from there."""
    on_cuda = torch.device(job.options.device or "cpu").type == "cuda"
    return RayMapper(ray or None, partial(set_up_worker, job.options, on_hub), int(on_cuda))


def _ready_to_measure(job: Job, ray: str | None) -> Mapper:
    """Say where the models are measured; this job reads those on the hub tensor by tensor.

    Adapters that PEFT would apply in part are refused; if it has done so before, it is silent.
    """
    models = job.parsed.referenced_models()
    adapted = [find_model_files(model, job.options) for model in models if model.lora]
    if problems := [
        p for each in adapted for p in (*each.problems, *bad_adapters(each, job.options))
    ]:
        raise BadInputError(*problems)
    try:
        on_hub = find_on_hub(models, job.options)
    except BadInputError:
        raise
    except Exception:
        require_models(models, job.options)  # says what is wrong
        raise
    open_on_hub(on_hub)
    return in_this_process if ray is None else _ray_mapper(ray, job, on_hub)


def _draw(path: Path, summary: Summary) -> None:
    comparison_figure([("Coefficients by layer", summary)]).savefig(path)
