"""Merges that appear whole or not at all."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge

from mergekit_metagpt import register
from mergekit_metagpt.measure.identity import Stat, changed_files, digest, require_unchanged
from mergekit_metagpt.merging import by_shard
from mergekit_metagpt.merging.card import PICTURE, write_card
from mergekit_metagpt.merging.finished import describe, require_in_range
from mergekit_metagpt.merging.record import deciding_options, merge_record, opened, versions
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.summary import Summary
from mergekit_metagpt.planning.config import plain
from mergekit_metagpt.planning.directory import Output, Work
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.planner import TensorMerge
from mergekit_metagpt.wording import BadInputError, reason
from mergekit_metagpt.workers import RayMapper

LOG = logging.getLogger(__name__)


def merge_whole(
    job: Job,
    out: Path,
    *,
    names: Mapping[str, str],
    draw: Callable[[Path, Summary], None] | None,
    mapper: RayMapper | None,
) -> dict[str, Any]:
    """Merge into a work directory, record the merge, and move it to ``out`` when complete.

    After a failure, or if the process is stopped or killed, complete weight files stay in the
    work directory, and the same merge goes on from them; see :class:`Output`. A job without a
    seed gets one that follows from what the merge is.

    Args:
        job: what to merge.
        out: the directory to make; must not exist, or be empty.
        names: of models on the hub, by their paths in the config, for what is published.
        draw: draws the coefficients into a PNG file, if there is to be a picture.
        mapper: the cluster that merges; None for this process.

    Returns:
        The content of its metagpt.json.
    """
    output, started = Output.of(out), _now()
    with output.locked(), opened(job) as inputs:
        files = _files(job, mapper)
        facts = _facts(job, inputs.identity, by_file=files is not None)
        if job.options.random_seed is None:
            seed = int(digest(facts)[:8], 16)  # numpy takes no larger ones
            job.options = job.options.model_copy(update={"random_seed": seed})
        facts["seed"] = job.options.random_seed
        with output.work(digest(facts), facts, lambda: not changed_files(inputs.stats)) as work:
            if files:
                by_shard.merge_by_shard(job, files, work, inputs.stats, mapper)
                describe(work.merged, job.parsed, job.options)
            else:
                _merge_at_once(job, work, inputs.stats)
            require_unchanged(inputs.stats)
            record = merge_record(job, inputs.as_json(), names)
            if job.options.write_model_card:
                if draw and job.entries:
                    with _at_worst(f"{PICTURE} could not be drawn (%s)."):
                        draw(work.merged / PICTURE, Summary(job.entries))
                source = work.merged / "mergekit_config.yml"
                source.write_text(record["config"], encoding="utf-8")
                with _at_worst("The model card could not be written (%s)."):
                    write_card(work.merged, out.absolute().name, record, names.values())
            record["times"] = {"started": started, "finished": _now()}
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            (work.merged / "metagpt.json").write_text(text, encoding="utf-8")
            output.publish(work)
    return record


def _files(job: Job, mapper: RayMapper | None) -> dict[str, list[TensorMerge]] | None:
    """Return the tensors of each file; None if MergeKit's ``run_merge`` has to merge all at once.

    The random numbers of MergeKit's own methods depend on the order of the tensors, so these
    cannot be merged in parts.
    """
    register()
    own, options = _is_own(job.parsed), job.options
    if mapper and not own:
        raise BadInputError(
            "The random numbers of MergeKit's own methods depend on the order of the tensors, "
            "which is not fixed on a cluster; choose metagpt or a metagpt_X in place of "
            f"{job.parsed.merge_method}, or merge without --ray."
        )
    by_file = mapper or (own and not (options.multi_gpu or options.async_write))
    return by_shard.planned_files(job) if by_file else None


def _is_own(config: MergeConfiguration) -> bool:
    return isinstance(merge_methods.get(config.merge_method), MetaGPTMerge)


def _facts(job: Job, inputs: list[Any], by_file: bool) -> dict[str, Any]:
    """Return what the bytes of a merge depend on, besides its seed; JSON types."""
    info, tokenizer = job.outputs.tokenizer_info if by_file else None, None
    if info:  # MergeKit may order its tokens anew in each run
        maps = {str(model): sorted(pairs.items()) for model, pairs in info.permutations.items()}
        tokenizer = digest(info.tokenizer.get_vocab(), maps)
    return {
        "config": plain(job.config.raw),
        "options": deciding_options(job),
        "versions": versions(),
        "inputs": inputs,
        "file by file": by_file,
        "tokenizer": tokenizer,
    }


def _merge_at_once(job: Job, work: Work, inputs: dict[str, Stat]) -> None:
    """Merge by MergeKit's ``run_merge``, unless that has been done."""
    record = work.records.get("all")
    if record is None:
        # MergeKit changes the config. To write a card, it asks the hub about local paths; that can
        # fail after hours of work.
        config = job.parsed.model_copy(deep=True)
        options = {"write_model_card": False, "quiet": not job.progress}
        experts = set(config.referenced_models()) - {config.base_model}
        with noted(in_all_threads=_is_own(config)) as entries:
            run_merge(config, str(work.merged), job.options.model_copy(update=options))
        require_in_range(work.merged, job.parsed.out_dtype)
        describe(work.merged, job.parsed, job.options)
        require_unchanged(inputs)
        own = [entry for entry in entries if experts.issuperset(entry.experts)]  # of no other merge
        record = {"entries": by_shard.as_json(own)}
        work.keep("all", record, [path for path in work.merged.rglob("*") if path.is_file()])
    job.entries.extend(by_shard.entries_of([record]))


@contextmanager
def _at_worst(warning: str) -> Iterator[None]:
    """Warn of a failure: the weights are complete, and may have taken hours."""
    try:
        yield
    except Exception as error:
        LOG.warning(warning, reason(error))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
