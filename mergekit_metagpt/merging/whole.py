"""Merges that appear whole or not at all."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge

from mergekit_metagpt.measure.identity import digest
from mergekit_metagpt.merging.by_shard import Plan, merge_by_shard
from mergekit_metagpt.merging.card import PICTURE, write_card
from mergekit_metagpt.merging.finished import describe
from mergekit_metagpt.merging.hub_names import named
from mergekit_metagpt.merging.inputs import Inputs, opened
from mergekit_metagpt.merging.ranges import dtypes_merged, may_overflow, require_in_range
from mergekit_metagpt.merging.record import deciding_options, merge_record, versions
from mergekit_metagpt.merging.shard import Written
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.registration import register
from mergekit_metagpt.method.session import noted
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.planning.chat_template import with_chosen_template
from mergekit_metagpt.planning.directory import Output, Work
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.outputs import Outputs
from mergekit_metagpt.planning.yaml_file import plain
from mergekit_metagpt.wording import BadInputError, reason
from mergekit_metagpt.workers import RayMapper

LOG = logging.getLogger(__name__)

# Draws the coefficients of a merge into a PNG file.
Draw = Callable[[Path, Summary], None]


def merge_whole(
    job: Job,
    out: Path,
    *,
    names: Mapping[str, str],
    draw: Draw | None,
    outputs: Outputs | None = None,
    mapper: RayMapper | None = None,
) -> dict[str, Any]:
    """Merge into a work directory, record the merge, and move it to ``out`` when complete.

    After a failure, or if the process is stopped or killed, complete weight files stay in the
    work directory, and the same merge goes on from them; see :class:`Output`.

    Args:
        job: what to merge. Without a seed, it gets one that follows from what the merge is.
        out: the directory to make; must not exist, or be empty.
        names: of models on the hub, by their paths in the config, for what is published.
        draw: draws the coefficients into a file; None if there is to be no picture.
        outputs: what will be written, if that is known.
        mapper: the cluster that merges; None for this process.

    Returns:
        The record of the merge, the content of its metagpt.json.

    Raises:
        BadInputError: if another merge is writing ``out``, a merged tensor overflows
            ``out_dtype``, or a weight file changed meanwhile.
    """
    output, started = Output.of(out), _now()
    job.parsed = with_chosen_template(job.parsed)
    with output.locked(), opened(job) as inputs:
        way = _Way.of(job, outputs, mapper)
        facts = _facts(job, inputs, way)
        if job.options.random_seed is None:
            seed = int(digest(facts)[:8], 16)  # numpy takes no larger ones
            job.options = job.options.model_copy(update={"random_seed": seed})
        facts["seed"] = job.options.random_seed
        with output.work(digest(facts), facts, inputs.are_unchanged) as work:
            way.merge(work, inputs)
            inputs.require_unchanged()
            record = _record(job, inputs, names)
            if job.options.write_model_card:
                _draw(work.merged / PICTURE, job.entries, draw)
                _write_card(work.merged, out.absolute().name, record, names)
            record["times"] = {"started": started, "finished": _now()}
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            (work.merged / "metagpt.json").write_text(text, encoding="utf-8")
            output.publish(work)
    return record


def _facts(job: Job, inputs: Inputs, way: "_Way") -> dict[str, Any]:
    """Return what the bytes of a merge depend on, besides its seed; JSON types."""
    return {
        "config": plain(job.config.raw),
        "options": deciding_options(job.parsed, job.options, by_direction=way.by_direction),
        "versions": versions(),
        "inputs": inputs.identity,
        "file by file": way.plan is not None,
        "tokenizer": way.plan and way.plan.tokenizer,
    }


@dataclass(frozen=True)
class _Way:
    """How a merge is run: file by file, or at once by MergeKit's ``run_merge``.

    The random numbers of MergeKit's own methods depend on the order of the tensors, so these
    cannot be merged in parts.
    """

    job: Job
    plan: Plan | None
    mapper: RayMapper | None

    @classmethod
    def of(cls, job: Job, outputs: Outputs | None, mapper: RayMapper | None) -> "_Way":
        register()
        method, options = job.parsed.merge_method, job.options
        own = isinstance(merge_methods.get(method), MetaGPTMerge)
        if mapper and not own:
            raise BadInputError(
                "The random numbers of MergeKit's own methods depend on the order of the tensors, "
                "which is not fixed on a cluster; choose metagpt or a metagpt_X in place of "
                f"{method}, or merge without --ray."
            )
        by_file = mapper or (own and not (options.multi_gpu or options.async_write))
        return cls(job, Plan.of(job, outputs) if by_file else None, mapper)

    @property
    def by_direction(self) -> bool:
        """Whether any tensor has a coefficient for every direction, as far as is known."""
        tensors = self.plan.outputs.tensors if self.plan else ()
        return any(tensor.merge.by_direction for tensor in tensors)

    def merge(self, work: Work, inputs: Inputs) -> None:
        """Write all that ``run_merge`` does, but no model card."""
        if self.plan:
            merge_by_shard(self.job, self.plan, work, inputs, self.mapper)
            self._correct(work)
            return
        job, records = self.job, work.records
        models = {str(model): model for model in job.parsed.referenced_models()}
        if not records:
            with noted(in_all_threads=True) as entries:
                _run_merge(job, work.merged)
            self._correct(work)
            inputs.require_unchanged()
            files = [path for path in work.merged.rglob("*") if path.is_file()]
            written = Written([path.name for path in files], [], 0, entries)
            work.keep("all", written.as_json(), files)
            records = work.records
        job.entries.extend(Written.of(records["all"], models).entries)

    def _correct(self, work: Work) -> None:
        try:
            for sentence in describe(work.merged, self.job.parsed, self.job.options):
                LOG.warning("%s", sentence)
        except Exception as error:  # the weights are complete, and may have taken hours
            LOG.warning("config.json could not be compared with the weights (%s).", reason(error))


def _run_merge(job: Job, directory: Path) -> None:
    # MergeKit changes the config. To write a card, it asks the hub about local paths; that can
    # fail after hours of work.
    config = job.parsed.model_copy(deep=True)
    options = {"write_model_card": False, "quiet": not job.progress}
    run_merge(config, str(directory), job.options.model_copy(update=options))
    if config.out_dtype and may_overflow(config.out_dtype, dtypes_merged(config)):
        require_in_range(directory, config.out_dtype)


def _record(job: Job, inputs: Inputs, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a merge, with the names of models in place of their paths."""
    text = job.config.text
    if names:
        text = yaml.safe_dump(named(job.config.raw, names), sort_keys=False, allow_unicode=True)
    record = merge_record(job.parsed, text, inputs.as_json(), job.entries, job.options)
    return named(record, names)  # type: ignore[no-any-return]


def _draw(path: Path, entries: Sequence[Entry], draw: Draw | None) -> None:
    """Draw the coefficients; after a failure only the picture is missing."""
    if draw is None or not entries:
        return
    try:
        draw(path, Summary(entries))
    except Exception as error:  # of matplotlib
        LOG.warning("%s could not be drawn (%s).", path.name, reason(error))


def _write_card(
    directory: Path, name: str, record: dict[str, Any], names: Mapping[str, str]
) -> None:
    """Write what MergeKit calls the model card; after a failure only the card is missing."""
    source = record["config"]
    (directory / "mergekit_config.yml").write_text(source, encoding="utf-8")
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(source))
        write_card(directory / "README.md", name, config, source, record, names.values())
    except Exception as error:
        LOG.warning(
            "The model card could not be written (%s); the merge goes on without it.",
            reason(error),
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
