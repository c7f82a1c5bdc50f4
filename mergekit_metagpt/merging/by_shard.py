"""Merges file by file of the output: in this process or on a Ray cluster, with the same bytes.

MergeKit's planner says which tensors the output will have, and headers say how large they are.
So it is known before the merge which tensors MergeKit's writer puts into which file. Each file is
a task, on its own part of the plan. A merge that stops can therefore go on from the files that are
complete. Work that all tasks share is done once: LoRA adapters are applied, the tokenizer is
built, the models are surveyed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import TokenizerInfo

from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.mergekit_private import (
    copy_tagalong_files,
    copy_tokenizer,
    model_out_config,
    note_shard,
    set_chat_template,
    update_config_vocab,
)
from mergekit_metagpt.merging.journal import Facts, Journal
from mergekit_metagpt.merging.ranges import may_overflow
from mergekit_metagpt.merging.shard import UNFINISHED, Shard, ShardMerge
from mergekit_metagpt.method.merge_method import MetaGPTMerge, register
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.destination import Partial
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.planning.outputs import (
    Outputs,
    OutputTensor,
    output_rows,
    output_shards,
    plan_outputs,
)
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process

LOG = logging.getLogger(__name__)

_FILE = "the merge config"  # as messages call it


@dataclass(frozen=True)
class Plan:
    """What a merge writes, and into which files.

    Attributes:
        outputs: what it writes.
        files: what MergeKit's writer would put into each file.
    """

    outputs: Outputs
    files: list[list[OutputTensor]]

    @classmethod
    def of(
        cls, config: MergeConfiguration, options: MergeOptions, outputs: Outputs | None
    ) -> "Plan":
        """Plan a merge.

        Args:
            config: what to merge.
            options: MergeKit's options.
            outputs: what it writes, if that is known; it must hold for the models with their
                adapters applied.
        """
        outputs = outputs or _plan(config, options)
        rows = output_rows(outputs, config.tokenizer, _FILE)
        return cls(outputs, output_shards(outputs.tensors, rows, options.out_shard_size))


def merge_by_shard(
    config: MergeConfiguration,
    options: MergeOptions,
    plan: Plan,
    journal: Journal,
    mapper: RayMapper | None = None,
) -> None:
    """Merge file by file of the output; the bytes are those of MergeKit's ``run_merge``.

    Files that the journal knows are not merged again. On a cluster, each task runs with the number
    of threads that PyTorch has in this process (``--num-threads``), and reserves that many CPUs.

    Args:
        config: what to merge, by a method of this package.
        options: MergeKit's options.
        plan: the plan of the merge.
        journal: where to write, and what is there; for a cluster, storage that all its machines
            share.
        mapper: the cluster; None for this process.

    Raises:
        ChangedError: if the merge was begun before, and something has changed since.
        ValueError: if an input or the result is not finite.
        FileNotFoundError: if a machine does not see the directory.
    """
    outputs, directory = plan.outputs, journal.partial.path
    info, dtypes = outputs.tokenizer_info, {tensor.merged_dtype for tensor in outputs.tensors}
    known = journal.begin(_facts(plan), config.referenced_models())
    files = dict(enumerate(plan.files, start=1))
    to_do = {number: file for number, file in files.items() if number not in known}
    surveys = _take_surveys(to_do.values(), options, mapper or in_this_process)
    merge = ShardMerge(
        directory=directory,
        options=options,
        out_dtype=config.out_dtype if may_overflow(config.out_dtype, dtypes) else None,
        seed=torch.initial_seed() if options.random_seed is None else options.random_seed,
        threads=torch.get_num_threads(),
        surveys=surveys if mapper else {},  # this process has them
        tokenizer={outputs.tokenizer: info} if outputs.tokenizer and info else {},
        quiet=options.quiet or mapper is not None,
    )
    shards = [Shard(n, tuple(tensor.merge.save for tensor in file)) for n, file in to_do.items()]
    tasks = mapper.submit(merge.write, shards, cpus=merge.threads) if mapper else []
    written = mapper.results(tasks) if mapper else map(merge.write, shards)
    writer = TensorWriter(str(directory), safe_serialization=options.safe_serialization)
    noted = []
    ending = _ending_with(mapper, tasks, journal.partial) if mapper else nullcontext()
    with ending, ThreadPoolExecutor(1) as disk:  # waits for it while the next file is merged
        for number in tqdm.tqdm(files, "Merging", unit="file", disable=options.quiet or not mapper):
            if number in known:
                shard = known[number]
            else:
                shard = next(written)
                noted.append(disk.submit(journal.note, shard))
            if mapper or number in known:
                SESSION.note(shard.entries)
            note_shard(writer, shard.file, shard.tensors, shard.size)
    for each in noted:
        each.result()
    for leftover in directory.glob(f"{UNFINISHED}*"):  # of workers that died
        shutil.rmtree(leftover)
    writer.finalize()  # type: ignore[no-untyped-call]
    _write_model_files(config, directory, options, outputs.architecture, info)


def _facts(plan: Plan) -> Facts:
    """Return what the bytes of a merge depend on, besides config, models and options."""
    info = plan.outputs.tokenizer_info
    merges = [tensor.merge for tensor in plan.outputs.tensors]
    facts: Facts = {"the list of tensors": [[t.name for t in file] for file in plan.files]}
    if info is not None:
        maps = {str(model): sorted(found.items()) for model, found in info.permutations.items()}
        known = json.dumps([info.tokenizer.get_vocab(), maps], sort_keys=True)
        facts["the tokenizer"] = hashlib.sha256(known.encode()).hexdigest()
    if any(merge.has_matrices for merge in merges):  # the last bits of products depend on it
        facts["the number of threads"] = torch.get_num_threads()
    return facts


@contextmanager
def _ending_with(mapper: RayMapper, tasks: Sequence[Any], partial: Partial) -> Iterator[None]:
    """After an exception, end the tasks before it is raised: what has not begun finds no place."""
    try:
        yield
    except Exception:
        os.rename(partial.path, partial.removed)
        mapper.wait(tasks)
        os.rename(partial.removed, partial.path)
        raise


def is_own(config: MergeConfiguration) -> bool:
    """Return whether a config is merged by a method of this package.

    Only these can be merged in parts: the random numbers of MergeKit's own methods depend on the
    order of the tensors.
    """
    register()
    return isinstance(merge_methods.get(config.merge_method), MetaGPTMerge)


def _plan(config: MergeConfiguration, options: MergeOptions) -> Outputs:
    """Plan the merge of the models with their adapters applied."""
    LoaderCache().setup(options)
    models = config.referenced_models()
    for model in models:
        LoaderCache().get(model)  # applies its adapter, or downloads it
    found = {model: find_model_files(model, options) for model in models}
    return plan_outputs(config, options, found, _FILE)


def _take_surveys(
    files: Iterable[list[OutputTensor]], options: MergeOptions, mapper: Mapper
) -> dict[Checkpoints, Survey]:
    """Take all surveys that the merge of some files will need."""
    wanted = set()
    for tensor in chain.from_iterable(files):
        if not GRANULARITIES[tensor.merge.parameters["granularity"]].needs_survey:
            continue
        base = tensor.merge.base
        experts = tuple(canonical(tensor.stored.keys() - {base}))
        if base in tensor.stored and experts and tensor.merged_dtype.is_floating_point:
            assert base is not None
            wanted.add(Checkpoints(base, experts))
    for checkpoints in wanted:
        device, progress = options.device or "cpu", not options.quiet
        SESSION.surveys.survey_of(checkpoints, device, progress, mapper)
    return SESSION.surveys.share(wanted)


def _write_model_files(
    config: MergeConfiguration,
    directory: Path,
    options: MergeOptions,
    architecture: ModelArchitecture,
    info: TokenizerInfo | None,
) -> None:
    """Write all files but the weights, with the functions and in the order of ``run_merge``."""
    model_config = model_out_config(config, architecture, options.trust_remote_code)
    if info is not None:
        multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
        update_config_vocab(model_config, architecture, info.tokenizer, multiple)
    model_config.save_pretrained(directory)
    if info is not None:
        set_chat_template(info.tokenizer, config)
        info.tokenizer.save_pretrained(directory, safe_serialization=True)
    elif options.copy_tokenizer:
        try:
            copy_tokenizer(config, str(directory), options)
        except Exception as error:  # tokenizers raise many kinds of errors
            LOG.error("Failed to copy tokenizer: %s. Copy it from somewhere else.", error)
    copy_tagalong_files(config, str(directory), architecture.tagalong_files or [], options)
