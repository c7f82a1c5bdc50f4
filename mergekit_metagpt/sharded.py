"""Merges on a Ray cluster: a task for each output shard, and the bytes of a local merge.

MergeKit's planner says which tensors there will be, and headers how large they are. That
settles which of them its writer puts into which file, before any is merged; so a task can be
given the part of the plan that fills one file. What tasks have in common is done once, here:
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
from mergekit.merge import (
    _copy_tagalong_files,
    _copy_tokenizer,
    _model_out_config,
    _set_chat_template,
    _update_config_vocab,
)
from mergekit.options import MergeOptions
from mergekit.tokenizer import TokenizerInfo

from mergekit_metagpt import journal
from mergekit_metagpt.checkpoints import Checkpoints
from mergekit_metagpt.distributed import RayMapper
from mergekit_metagpt.kept_surveys import Surveys, kept_survey, surveys_to_share
from mergekit_metagpt.methods import MetaGPTMerge, register
from mergekit_metagpt.output_shards import UNFINISHED, Shard, ShardMerge, Written
from mergekit_metagpt.preflight.costs import written_shards
from mergekit_metagpt.preflight.models import open_checkpoint
from mergekit_metagpt.preflight.planned import MergePlan, plan_merge
from mergekit_metagpt.preflight.vocabularies import output_rows
from mergekit_metagpt.survey import canonical

LOG = logging.getLogger(__name__)

_FILE = "the merge config"  # as messages call it


def merge_on_cluster(
    config: MergeConfiguration,
    source: str,
    directory: Path,
    options: MergeOptions,
    *,
    mapper: RayMapper,
) -> None:
    """Merge on a Ray cluster, to the bytes of :func:`mergekit_metagpt.whole.merge_here`.

    A task runs as many threads as PyTorch has in this process (``--num-threads``) and takes up
    as many CPUs: sums that the sparsified methods take depend on it in their last bits.

    Args:
        config: what to merge, by a method of this package.
        source: its YAML, as it was written.
        directory: to be made, on storage that all machines of the cluster share.
        options: MergeKit's options.
        mapper: the cluster.

    Raises:
        ValueError: if the method is another one, or an input or the result is not finite.
        FileNotFoundError: if a machine does not see ``directory``.
    """
    _require_own_method(config)
    plan, shards = _plan(config, options)
    tokenizer = {plan.tokenizer: plan.tokenizer.execute()} if plan.tokenizer else {}
    writer = TensorWriter(str(directory), safe_serialization=options.safe_serialization)
    merge = ShardMerge(
        directory=directory,
        options=options,
        out_dtype=config.out_dtype,
        seed=torch.initial_seed() if options.random_seed is None else options.random_seed,
        threads=torch.get_num_threads(),
        surveys=_take_surveys(plan, options, mapper),
        tokenizer=tokenizer,
    )
    tasks = mapper.submit(merge.write, shards, cpus=merge.threads)
    try:
        results = mapper.results(tasks)
        bar = tqdm.tqdm(results, "Merging", len(tasks), unit="shard", disable=options.quiet)
        for written in bar:
            _note(written, writer)
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)  # so that no further task begins
        mapper.wait(tasks)
        raise
    for leftover in directory.glob(f"{UNFINISHED}*"):  # of workers that died
        shutil.rmtree(leftover)
    writer.finalize()  # type: ignore[no-untyped-call]
    info = next(iter(tokenizer.values()), None)
    _write_model_files(config, source, directory, options, plan.architecture, info)


def _require_own_method(config: MergeConfiguration) -> None:
    register()
    if not isinstance(merge_methods.get(config.merge_method), MetaGPTMerge):
        raise ValueError(
            "On a cluster tensors are merged in no fixed order, on which the random numbers of "
            f"MergeKit's own methods depend; choose metagpt or a metagpt_X in place of "
            f"{config.merge_method}, or merge without --ray."
        )


def _plan(config: MergeConfiguration, options: MergeOptions) -> tuple[MergePlan, list[Shard]]:
    """Plan the merge, and return what MergeKit's writer would put into each file."""
    LoaderCache().setup(options)
    models = config.referenced_models()
    for model in models:
        LoaderCache().get(model)  # applies its adapter, or downloads it
    checkpoints = {model: open_checkpoint(model, options) for model in models}
    plan = plan_merge(config, options, checkpoints, _FILE)
    rows = output_rows(plan, config.tokenizer, _FILE)
    files = written_shards(plan, rows, options.out_shard_size)
    shards = [
        Shard(number, tuple(tensor.save for tensor in file))
        for number, file in enumerate(files, start=1)
    ]
    return plan, shards


def _take_surveys(
    plan: MergePlan, options: MergeOptions, mapper: RayMapper
) -> dict[Checkpoints, Surveys]:
    """Measure on the cluster what the merge of any tensor will ask for."""
    # One tensor stands for all that come from the same models in the same dtypes.
    wanted: dict[tuple[Checkpoints, torch.dtype, frozenset[str]], str] = {}
    for tensor in plan.tensors:
        if dict(tensor.task.parameters.items())["granularity"] == "tensor":
            continue
        base = tensor.task.base_model
        experts = tuple(canonical(tensor.stored.keys() - {base}))
        if base in tensor.stored and experts and tensor.merged_dtype.is_floating_point:
            assert base is not None
            stored = frozenset(header.dtype for header in tensor.stored.values())
            checkpoints = Checkpoints(base, experts)
            wanted.setdefault((checkpoints, tensor.merged_dtype, stored), tensor.name)
    for (checkpoints, dtype, _), name in wanted.items():
        device, progress = options.device or "cpu", not options.quiet
        kept_survey(checkpoints, name, dtype, device, progress, mapper)
    return surveys_to_share(checkpoints for checkpoints, _, _ in wanted)


def _note(written: Written, writer: TensorWriter) -> None:
    """Make a task's work that of this process' writer and journal."""
    writer.weight_map.update(dict.fromkeys(written.tensors, written.file))
    writer.total_size += written.size
    writer.shards_written += 1
    journal.add(written.entries)


def _write_model_files(
    config: MergeConfiguration,
    source: str,
    directory: Path,
    options: MergeOptions,
    architecture: ModelArchitecture,
    info: TokenizerInfo | None,
) -> None:
    """Write what belongs to the weights, with the functions and in the order of ``run_merge``."""
    model_config = _model_out_config(config, architecture, options.trust_remote_code)
    if info is not None:
        multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
        _update_config_vocab(model_config, architecture, info.tokenizer, multiple)
    model_config.save_pretrained(directory)
    if options.write_model_card:
        (directory / "mergekit_config.yml").write_text(source, "utf-8")
    if info is not None:
        _set_chat_template(info.tokenizer, config)
        info.tokenizer.save_pretrained(directory, safe_serialization=True)
    elif options.copy_tokenizer:
        try:
            _copy_tokenizer(config, str(directory), options)
        except Exception as error:  # of any of the many tokenizers
            LOG.error("Failed to copy tokenizer: %s. Copy it from somewhere else.", error)
    _copy_tagalong_files(config, str(directory), architecture.tagalong_files or [], options)
