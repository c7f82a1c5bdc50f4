"""The functions of the Python interface; the commands of the same names do the same."""

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.api.results import Merged, Plan, Survey
from mergekit_metagpt.api.running import adopt_survey, forecast_of, measured, publication
from mergekit_metagpt.merging.whole import merge_whole
from mergekit_metagpt.method.merge_method import register
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import ConfigFile, read_config
from mergekit_metagpt.planning.fingerprints import with_fresh_lora_cache
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
    keep: bool = False,
) -> Survey:
    """Measure the task vectors of experts.

    Merges and plans of the same models in this process do not measure them again.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it: ``model``, ``model@revision`` or
            ``model+lora``.
        experts: θ_t, T models, each given like the base.
        options: MergeKit's options, such as the device. ``quiet`` hides the progress bar.
        keep: whether models of the hub are downloaded to its cache. If not, their tensors are
            read from the hub one by one and not stored.

    Returns:
        The survey, with the experts in the given order.

    Raises:
        ValueError: if models are missing or cannot be compared, or if a tensor holds NaN or Inf.
            The message names the model and the tensor.
    """
    references = [ModelReference.model_validate(expert) for expert in experts]
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "metagpt",
            "base_model": base,
            "models": [{"model": model} for model in references],
        }
    )
    options = with_fresh_lora_cache(options or MergeOptions(), config)
    found, of, text = measured(config, options, keep=keep, progress=not options.quiet)
    return Survey(of, found.in_order_of(references), text)


def plan(
    config: Config,
    *,
    granularity: str | None = None,
    survey: str | Path | None = None,
    options: MergeOptions | None = None,
    keep: bool = False,
) -> Plan:
    """Return the coefficients that a merge will use; nothing is merged.

    Args:
        config: the path of a merge config, or its content.
        granularity: if given, replaces the config's.
        survey: a survey file to take norms from.
        options: MergeKit's options.
        keep: whether models of the hub are downloaded to its cache, for a merge.

    Raises:
        ValueError: if the merge would refuse the config or its models; says why.
    """
    register()
    options = options or MergeOptions()
    found = forecast_of(
        _written(config),
        options,
        survey=None if survey is None else str(survey),
        granularity=granularity,
        keep=keep,
        progress=not options.quiet,
        warn=_log,
    )
    return Plan(found)


def merge(
    config: Config,
    out: str | Path,
    *,
    survey: str | Path | None = None,
    options: MergeOptions | None = None,
) -> Merged:
    """Check a merge, then merge into a new directory, which appears whole or not at all.

    Args:
        config: the path of a merge config, or its content.
        out: the directory to make; must not exist, or be empty.
        survey: a survey file to take norms from.
        options: MergeKit's options. A seed is drawn if they have none.

    Raises:
        ValueError: if the merge has problems; names all of them.
    """
    written, options = _written(config), options or MergeOptions()
    if options.random_seed is None:
        options = options.model_copy(update={"random_seed": secrets.randbits(32)})
    problems = inspect(written, str(out), options).problems
    if problems:
        raise BadInputError(*problems)
    parsed = written.parse()
    options = with_fresh_lora_cache(options, parsed)
    with SESSION.journal() as entries:
        adopt_survey(None if survey is None else str(survey), parsed, options)
        published = publication(written, Path(out))
        merge_whole(parsed, written.text, Path(out), options, published=published)
    record = json.loads(Path(out, "metagpt.json").read_text("utf-8"))
    return Merged(Path(out), Summary(entries), record)


def _written(config: Config) -> ConfigFile:
    """Return a config as if it had been read from a file."""
    if isinstance(config, str | Path):
        return read_config(str(config))
    if isinstance(config, MergeConfiguration):
        text = config.to_yaml()
        return ConfigFile("the config", text, yaml.safe_load(text))
    return ConfigFile("the config", yaml.safe_dump(dict(config), sort_keys=False), dict(config))


def _log(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        LOG.warning("%s", sentence)
