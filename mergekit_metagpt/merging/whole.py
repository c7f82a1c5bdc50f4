"""Merges that appear whole or not at all."""

import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_metagpt.merging.inputs import Inputs
from mergekit_metagpt.merging.ranges import dtypes_merged, may_overflow, require_in_range
from mergekit_metagpt.merging.record import merge_record, write_card
from mergekit_metagpt.merging.reservation import discard, keep, publish, reserved
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.planning.destination import Destination, Partial
from mergekit_metagpt.planning.headers import read_weights
from mergekit_metagpt.wording import BadInputError, reason

LOG = logging.getLogger(__name__)

# Merges a config into a new directory; writes all that `run_merge` does, but no model card.
Merger = Callable[[MergeConfiguration, Path, MergeOptions], None]


def merge_here(config: MergeConfiguration, directory: Path, options: MergeOptions) -> None:
    """Merge in this process, with MergeKit's ``run_merge``."""
    # To write a card, MergeKit asks the hub about local paths; that can fail after hours of work.
    run_merge(config, str(directory), options.model_copy(update={"write_model_card": False}))
    if config.out_dtype and may_overflow(config.out_dtype, dtypes_merged(config)):
        require_in_range(directory, config.out_dtype)


def merge_whole(
    config: MergeConfiguration,
    source: str,
    out: Path,
    options: MergeOptions,
    merge: Merger = merge_here,
) -> None:
    """Merge into a partial directory, record the merge, and move it to ``out`` when complete.

    That directory is ``OUT.metagpt-partial-TOKEN``, beside ``out``, or in it if ``out`` exists.
    A merge that fails removes it. If a merge is killed, the next merge into ``out`` removes it.
    Once the weights are complete, it is removed only if they are refused, and kept after any
    other failure.

    Args:
        config: what to merge; MergeKit changes it.
        source: its YAML, as it was written.
        out: the directory to make; must not exist, or be empty.
        options: MergeKit's options.
        merge: writes everything but the model card and the record.

    Raises:
        BadInputError: if another merge is writing ``out``, a merged tensor overflows
            ``out_dtype``, or a weight file changed meanwhile.
        RuntimeError: if the weights are complete, but a later step failed; says where they are.
    """
    given = config.model_copy(deep=True)
    destination = Destination.of(out)
    with reserved(destination) as partial:
        started = _now()
        try:
            inputs = Inputs.of(config, options)
            with SESSION.journal() as entries:
                merge(config, partial.path, options)
            inputs.require_unchanged()
            record = merge_record(given, source, inputs, entries, options)
            if options.write_model_card:
                _write_card(partial.path, out.absolute().name, given, source, record)
            record["times"] = {"started": started, "finished": _now()}
            _write_record(partial.path, record)
            publish(partial, destination)
        except BaseException as error:
            _keep_or_discard(partial, destination, error)
            raise


def _write_card(
    directory: Path, name: str, config: MergeConfiguration, source: str, record: dict[str, Any]
) -> None:
    """Write what MergeKit calls the model card; after a failure only the card is missing."""
    (directory / "mergekit_config.yml").write_text(source, encoding="utf-8")
    try:
        write_card(directory / "README.md", name, config, source, record)
    except Exception as error:  # of the hub, which MergeKit asks about paths with one slash
        LOG.warning(
            "The model card could not be written (%s); the merge goes on without it. For paths "
            "that are absolute or start with ./ MergeKit does not ask the hub.",
            reason(error),
        )


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (directory / "metagpt.json").write_text(text, encoding="utf-8")


def _keep_or_discard(partial: Partial, destination: Destination, error: BaseException) -> None:
    """Remove a merge that failed, unless its weights are complete and were not refused.

    Raises:
        RuntimeError: if they are kept.
    """
    if isinstance(error, BadInputError) or not _has_weights(partial.path):
        discard(partial)
        return
    keep(partial)
    raise RuntimeError(
        f"The weights are complete and kept in {partial.path}, but the merge could not be "
        f"finished as {destination.path} ({reason(error)}); move them there yourself."
    ) from error


def _has_weights(directory: Path) -> bool:
    return directory.is_dir() and not read_weights(str(directory), directory).problems


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
