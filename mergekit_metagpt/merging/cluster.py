"""Merges on a Ray cluster: one task for each output shard, and the same bytes as a local merge.

MergeKit's planner says which tensors the output will have, and headers say how large they are.
So it is known before the merge which tensors MergeKit's writer puts into which file, and each
task gets the part of the plan that fills one file. Work that all tasks share is done once, here:
LoRA adapters are applied, the tokenizer is built, the models are surveyed.
"""

import logging
import shutil
from pathlib import Path

import torch
import tqdm
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import TokenizerInfo

from mergekit_metagpt.granularities import GRANULARITIES
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
from mergekit_metagpt.merging.ranges import may_overflow
from mergekit_metagpt.merging.shard import UNFINISHED, Shard, ShardMerge
from mergekit_metagpt.method.merge_method import MetaGPTMerge, register
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.planning.outputs import Outputs, output_rows, output_shards, plan_outputs
from mergekit_metagpt.workers import RayMapper

LOG = logging.getLogger(__name__)

_FILE = "the merge config"  # as messages call it


def merge_on_cluster(
    config: MergeConfiguration,
    directory: Path,
    options: MergeOptions,
    *,
    mapper: RayMapper,
    outputs: Outputs | None = None,
) -> None:
    """Merge on a Ray cluster; the bytes are those of ``whole.merge_here``.

    Each task runs with the number of threads that PyTorch has in this process
    (``--num-threads``), and reserves that many CPUs. The last bits of sums in the sparsified
    methods depend on this number.

    Args:
        config: what to merge, by a method of this package.
        directory: the directory to make, on storage that all machines of the cluster share.
        options: MergeKit's options.
        mapper: the cluster.
        outputs: the plan of the merge, if it has been made; it must hold for the models with
            their adapters applied.

    Raises:
        ValueError: if the method is not this package's, or an input or the result is not finite.
        FileNotFoundError: if a machine does not see ``directory``.
    """
    _require_own_method(config)
    outputs = outputs or _plan(config, options)
    shards = _shards(outputs, config, options)
    info = outputs.tokenizer_info
    dtypes = {tensor.merged_dtype for tensor in outputs.tensors}
    writer = TensorWriter(str(directory), safe_serialization=options.safe_serialization)
    merge = ShardMerge(
        directory=directory,
        options=options,
        out_dtype=config.out_dtype if may_overflow(config.out_dtype, dtypes) else None,
        seed=torch.initial_seed() if options.random_seed is None else options.random_seed,
        threads=torch.get_num_threads(),
        surveys=_take_surveys(outputs, options, mapper),
        tokenizer={outputs.tokenizer: info} if outputs.tokenizer and info else {},
    )
    tasks = mapper.submit(merge.write, shards, cpus=merge.threads)
    try:
        results = mapper.results(tasks)
        bar = tqdm.tqdm(results, "Merging", len(tasks), unit="shard", disable=options.quiet)
        for written in bar:
            note_shard(writer, written.file, written.tensors, written.size)
            SESSION.note(written.entries)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)  # so that no further task begins
        mapper.wait(tasks)
        raise
    for leftover in directory.glob(f"{UNFINISHED}*"):  # of workers that died
        shutil.rmtree(leftover)
    writer.finalize()  # type: ignore[no-untyped-call]
    _write_model_files(config, directory, options, outputs.architecture, info)


def _require_own_method(config: MergeConfiguration) -> None:
    register()
    if not isinstance(merge_methods.get(config.merge_method), MetaGPTMerge):
        raise ValueError(
            "The random numbers of MergeKit's own methods depend on the order of the tensors, "
            f"which is not fixed on a cluster; choose metagpt or a metagpt_X in place of "
            f"{config.merge_method}, or merge without --ray."
        )


def _plan(config: MergeConfiguration, options: MergeOptions) -> Outputs:
    """Plan the merge of the models with their adapters applied."""
    LoaderCache().setup(options)
    models = config.referenced_models()
    for model in models:
        LoaderCache().get(model)  # applies its adapter, or downloads it
    found = {model: find_model_files(model, options) for model in models}
    return plan_outputs(config, options, found, _FILE)


def _shards(outputs: Outputs, config: MergeConfiguration, options: MergeOptions) -> list[Shard]:
    """Return what MergeKit's writer would put into each file."""
    rows = output_rows(outputs, config.tokenizer, _FILE)
    return [
        Shard(number, tuple(tensor.merge.save for tensor in tensors))
        for number, tensors in enumerate(
            output_shards(outputs.tensors, rows, options.out_shard_size), start=1
        )
    ]


def _take_surveys(
    outputs: Outputs, options: MergeOptions, mapper: RayMapper
) -> dict[Checkpoints, Survey]:
    """Take all surveys that the merge will need, on the cluster."""
    wanted = set()
    for tensor in outputs.tensors:
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
