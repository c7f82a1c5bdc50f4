"""Merges that appear whole or not at all."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_metagpt.merging.by_shard import Plan, is_own, merge_by_shard
from mergekit_metagpt.merging.card import PICTURE, Publication, write_card
from mergekit_metagpt.merging.hub_names import named, named_entries, named_source
from mergekit_metagpt.merging.inputs import Inputs
from mergekit_metagpt.merging.journal import ChangedError, Facts, Journal
from mergekit_metagpt.merging.ranges import dtypes_merged, may_overflow, require_in_range
from mergekit_metagpt.merging.record import deciding_options, merge_record, versions
from mergekit_metagpt.merging.reservation import discard, keep, publish, reserved
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.planning.destination import Destination
from mergekit_metagpt.planning.fingerprints import fingerprints_of
from mergekit_metagpt.planning.headers import read_weights
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.wording import BadInputError, reason
from mergekit_metagpt.workers import RayMapper

LOG = logging.getLogger(__name__)


def merge_whole(
    config: MergeConfiguration,
    source: str,
    out: Path,
    options: MergeOptions,
    published: Publication | None = None,
    *,
    outputs: Outputs | None = None,
    mapper: RayMapper | None = None,
    resume: bool = False,
) -> None:
    """Merge into a partial directory, record the merge, and move it to ``out`` when complete.

    That directory is ``OUT.metagpt-partial-TOKEN``, beside ``out``, or in it if ``out`` exists.
    If a merge is refused, it is removed. If a merge fails otherwise, is stopped or is killed, it
    is kept as long as it holds complete output shards; the next merge into ``out`` goes on from
    them, or removes it. Once the weights are complete, it is kept for good, unless they are
    refused.

    Args:
        config: what to merge; MergeKit changes it.
        source: its YAML, as it was written.
        out: the directory to make; must not exist, or be empty.
        options: MergeKit's options.
        published: what else the card tells.
        outputs: what will be written, if that is known.
        mapper: the cluster that merges; None for this process.
        resume: go on with the last unfinished merge into ``out``, if there is one.

    Raises:
        BadInputError: if another merge is writing ``out``, a merged tensor overflows
            ``out_dtype``, a weight file changed meanwhile, or the unfinished merge cannot go on.
        RuntimeError: if the merge failed, but is kept; says where it is.
    """
    published = published or Publication()
    given = config.model_copy(deep=True)
    destination = Destination.of(out)
    with reserved(destination, resume) as partial:
        started = _now()
        journal = Journal(partial)
        try:
            inputs = Inputs.of(config, options)
            journal.facts = _facts(given, inputs, options)
            with SESSION.journal() as entries:
                _merge(config, options, journal, outputs, mapper)
            inputs.require_unchanged()
            if names := published.names:
                given = MergeConfiguration.model_validate(named(yaml.safe_load(source), names))
                source = named_source(source, names)
                entries = named_entries(entries, names)
                inputs = replace(inputs, models=named(inputs.models, names))
            record = merge_record(given, source, inputs, entries, options)
            if options.write_model_card:
                published = _checked(published, partial.path)
                _draw(partial.path / PICTURE, entries, published)
                _write_card(partial.path, out.absolute().name, given, source, record, published)
            record["times"] = {"started": started, "finished": _now()}
            _write_record(partial.path, record)
            publish(partial, destination)
        except ChangedError:
            raise
        except BaseException as error:
            _keep_or_discard(journal, destination, error)
            raise


def _facts(config: MergeConfiguration, inputs: Inputs, options: MergeOptions) -> Facts:
    """Return what the bytes of a merge depend on, as far as its record will tell."""
    return {
        "the config": config.to_yaml(),
        "the seed": options.random_seed,
        "the list of options": " ".join(deciding_options(config, options, [])),
        **{f"the version of {name}": version for name, version in versions().items()},
        **{
            f"weight file {file['name']} of {model['model']}": file["fingerprint"]
            for model in inputs.models
            for file in model["files"]
        },
    }


def _merge(
    config: MergeConfiguration,
    options: MergeOptions,
    journal: Journal,
    outputs: Outputs | None,
    mapper: RayMapper | None,
) -> None:
    """Write all that ``run_merge`` does, but no model card."""
    own = is_own(config)
    if mapper and not own:
        raise BadInputError(
            "The random numbers of MergeKit's own methods depend on the order of the tensors, "
            f"which is not fixed on a cluster; choose metagpt or a metagpt_X in place of "
            f"{config.merge_method}, or merge without --ray."
        )
    if mapper or (own and not (options.multi_gpu or options.async_write)):
        plan = Plan.of(config, options, outputs)
        if mapper or len(plan.files) > 1:
            merge_by_shard(config, options, plan, journal, mapper)
            return
    directory = journal.partial.path
    # To write a card, MergeKit asks the hub about local paths; that can fail after hours of work.
    run_merge(config, str(directory), options.model_copy(update={"write_model_card": False}))
    if config.out_dtype and may_overflow(config.out_dtype, dtypes_merged(config)):
        require_in_range(directory, config.out_dtype)


def _checked(published: Publication, directory: Path) -> Publication:
    """Return what the card tells, without scores that are of other weights than these."""
    if published.scored is None:
        return published
    weights = fingerprints_of(map(Path, read_weights(str(directory), directory).files))
    if sorted(published.scored) == weights:
        return published
    LOG.warning(
        "The card shows no scores: those of --model-index are of other weights. Score this merge, "
        "or repeat the one that was scored, with its --random-seed."
    )
    return replace(published, scores=())


def _draw(path: Path, entries: Sequence[Entry], published: Publication) -> None:
    """Draw the coefficients; after a failure only the picture is missing."""
    if published.draw is None or not entries:
        return
    try:
        published.draw(path, Summary(entries))
    except Exception as error:  # of matplotlib
        LOG.warning("%s could not be drawn (%s).", path.name, reason(error))


def _write_card(
    directory: Path,
    name: str,
    config: MergeConfiguration,
    source: str,
    record: dict[str, Any],
    published: Publication,
) -> None:
    """Write what MergeKit calls the model card; after a failure only the card is missing."""
    (directory / "mergekit_config.yml").write_text(source, encoding="utf-8")
    try:
        write_card(directory / "README.md", name, config, source, record, published)
    except Exception as error:
        LOG.warning(
            "The model card could not be written (%s); the merge goes on without it.",
            reason(error),
        )


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (directory / "metagpt.json").write_text(text, encoding="utf-8")


def _keep_or_discard(journal: Journal, destination: Destination, error: BaseException) -> None:
    """Remove a merge that failed, unless its weights are complete, or it can go on.

    Raises:
        RuntimeError: if it is kept.
    """
    partial = journal.partial
    if isinstance(error, BadInputError):
        discard(partial)
    elif _has_weights(partial.path):
        keep(partial)
        raise RuntimeError(
            f"The weights are complete and kept in {partial.path}, but the merge could not be "
            f"finished as {destination.path} ({reason(error)}); move them there yourself."
        ) from error
    elif journal.complete and not isinstance(error, ValueError):
        raise RuntimeError(
            f"The merge has not been finished ({reason(error)}), but {len(journal.complete)} of "
            f"its files are complete and kept in {partial.path}; to go on, run the same command "
            "with --resume."
        ) from error
    else:
        discard(partial)


def _has_weights(directory: Path) -> bool:
    return directory.is_dir() and not read_weights(str(directory), directory).problems


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
