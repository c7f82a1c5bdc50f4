"""What the commands and the Python functions share: all but their arguments and reports."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.evaluation.model_index import read_scores
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.hub import HubModel, find_on_hub, is_looked_up, reading_from_hub
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.merging.card import Publication
from mergekit_metagpt.merging.hub_names import hub_names
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import ConfigFile, base_and_experts
from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
from mergekit_metagpt.planning.forecast import Forecast, forecast, own_method
from mergekit_metagpt.planning.models import require_models
from mergekit_metagpt.planning.survey_file import survey_as_text, surveyed
from mergekit_metagpt.preflight import ignored, inspect
from mergekit_metagpt.report.plots import comparison_figure
from mergekit_metagpt.wording import BadInputError
from mergekit_metagpt.workers import Mapper, in_this_process

# Tells the user of sentences; and, once the options are known, where the models are measured.
Warn = Callable[[Iterable[str]], None]
MapperOf = Callable[[MergeOptions, Sequence[HubModel]], Mapper]


def forecast_of(
    config: ConfigFile,
    options: MergeOptions,
    *,
    survey: str | None,
    granularity: str | None,
    numbers_only: bool = False,
    keep: bool,
    progress: bool,
    mapper: MapperOf | None = None,
    warn: Warn,
    save: Callable[[str], None] | None = None,
) -> Forecast:
    """Return the coefficients that the merge of a config will use.

    Args:
        config: the config, as it was written.
        options: MergeKit's options.
        survey: the path of a survey file.
        granularity: if given, replaces the config's.
        numbers_only: refuse matrices of coefficients.
        keep: whether models of the hub are downloaded to its cache.
        progress: whether progress bars are shown.
        mapper: where the models are measured, if not in this process.
        warn: is told of what MergeKit ignores in the config.
        save: is given the content of a survey file.
    """
    parsed = config.parse()
    with explained(config, options, warn):
        own_method(parsed)  # before the hub is asked for anything
        fresh = with_fresh_lora_cache(options, parsed)
        with _from_hub(parsed, fresh, keep) as on_hub:
            adopt_survey(survey, parsed, fresh)
            found = forecast(
                parsed,
                fresh,
                granularity=granularity,
                numbers_only=numbers_only,
                progress=progress,
                mapper=mapper(fresh, on_hub) if mapper else in_this_process,
            )
            if save:
                save(survey_as_text(found.survey, found.base))
    return found


@contextmanager
def _from_hub(
    config: MergeConfiguration, options: MergeOptions, keep: bool
) -> Iterator[Sequence[HubModel]]:
    """Let MergeKit read models of the hub tensor by tensor, unless they are to be kept."""
    try:
        models = [] if keep else find_on_hub(config.referenced_models(), options)
    except BadInputError:
        raise
    except Exception:
        require_models(config.referenced_models(), options)  # says what is wrong
        raise
    with reading_from_hub(models):
        yield models


@contextmanager
def explained(config: ConfigFile, options: MergeOptions, warn: Warn) -> Iterator[None]:
    """Warn of what MergeKit ignores in a config; explain a failure by the problems of ``check``."""
    known = ignored(config)
    warn(known)
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:
        problems = inspect(config, options=options).problems
        if set(problems) - set(known):
            raise BadInputError(*problems) from error
        raise


def measured(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    keep: bool,
    progress: bool,
    mapper: MapperOf | None = None,
) -> tuple[Survey, ModelReference, str]:
    """Return the survey of the models of a config, the base, and the content of a survey file.

    Args:
        config: any config with one base.
        options: MergeKit's options.
        keep: whether models of the hub are downloaded to its cache.
        progress: whether a progress bar is shown.
        mapper: where the models are measured, if not in this process.
    """
    models = config.referenced_models()
    require_models([it for it in models if keep or not is_looked_up(it)], options)
    LoaderCache().setup(options)
    base, experts = base_and_experts(config)
    checkpoints = Checkpoints(base, tuple(experts))
    with _from_hub(config, options, keep) as on_hub:
        SESSION.surveys.begin(checkpoints)
        survey = SESSION.surveys.survey_of(
            checkpoints,
            options.device or "cpu",
            progress,
            mapper(options, on_hub) if mapper else in_this_process,
            products=True,
        )
        return survey, base, survey_as_text(survey, base)


def adopt_survey(path: str | None, config: MergeConfiguration, options: MergeOptions) -> None:
    """Let all that follows in this process use the survey of a file, unless it is None."""
    if path is not None:
        checkpoints, survey = surveyed(path, *base_and_experts(config), options)
        SESSION.surveys.adopt({checkpoints: survey})


def publication(
    config: ConfigFile, out: Path, names: Sequence[str] = (), scores: Path | None = None
) -> Publication:
    """Return what the card of a merge tells, besides what the merge itself tells.

    Args:
        config: what will be merged.
        out: the directory of the merge.
        names: PATH=USER/NAME, for paths in the config.
        scores: a results file of lm-eval.
    """
    results, scored = read_scores(scores, out) if scores else ([], None)
    return Publication(
        names=hub_names(config.raw, names),
        draw=_draw if find_spec("matplotlib") else None,
        scores=results,
        scored=scored,
    )


def _draw(path: Path, summary: Summary) -> None:
    comparison_figure([("Coefficients by layer", summary)]).savefig(path)
