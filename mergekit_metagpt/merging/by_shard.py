"""Merges file by file of the output: in this process or on a Ray cluster, with the same bytes.

MergeKit's planner says which tensors the output will have, and headers say how large they are.
So it is known before the merge which tensors MergeKit's writer puts into which file. Each file is
a task, on its own part of the plan. A merge that stops can therefore go on from the files that are
complete. Work that all tasks share is done once: LoRA adapters are applied, the tokenizer is
built, the models are surveyed.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import tqdm
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import FinalizeModel, SaveTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from pydantic import TypeAdapter

from mergekit_metagpt import register
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.identity import Stat, digest, require_unchanged
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.mergekit_private import (
    copy_tagalong_files,
    copy_tokenizer,
    model_out_config,
    set_chat_template,
    update_config_vocab,
)
from mergekit_metagpt.merging.finished import require_in_range
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.summary import Entry
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.directory import Work
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.outputs import Outputs, OutputTensor
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process

LOG = logging.getLogger(__name__)
_ENTRIES = TypeAdapter(list[Entry])


@dataclass(frozen=True)
class Plan:
    """What a merge writes, and which tensors MergeKit's writer would put into each file."""

    outputs: Outputs
    files: dict[str, list[OutputTensor]]

    @classmethod
    def of(cls, job: Job) -> "Plan":
        """Plan a merge of models that are here, with their adapters applied."""
        outputs, options = job.outputs, job.options
        shards = outputs.shards(options.out_shard_size)
        stem, suffix = _only_file(options)
        if len(shards) == 1:
            return cls(outputs, {f"{stem}.{suffix}": shards[0]})
        names = (f"{stem}-{n:05}-of-{len(shards):05}.{suffix}" for n in range(1, len(shards) + 1))
        return cls(outputs, dict(zip(names, shards, strict=True)))

    @property
    def tokenizer(self) -> str | None:
        """The SHA-256 of the output's tokenizer; MergeKit may order its tokens anew in each run."""
        info = self.outputs.tokenizer_info
        if info is None:
            return None
        maps = {str(model): sorted(pairs.items()) for model, pairs in info.permutations.items()}
        return digest(info.tokenizer.get_vocab(), maps)


def _only_file(options: MergeOptions) -> tuple[str, str]:
    """Return stem and suffix of the weight file that MergeKit writes if it is the only one."""
    return ("model", "safetensors") if options.safe_serialization else ("pytorch_model", "bin")


class Shard(NamedTuple):
    """The name of a file of the output, and MergeKit's tasks that fill it."""

    file: str
    saves: Sequence[SaveTensor]


@dataclass(frozen=True)
class ShardMerge:
    """What a worker needs to know to merge any part of the plan."""

    work: Work
    inputs: dict[str, Stat]  # of this machine, as they were when the merge began
    options: MergeOptions  # with the seed and the number of threads that every task uses
    out_dtype: str | None
    surveys: dict[Checkpoints, Survey]
    tokenizer: Mapping[BuildTokenizer, TokenizerInfo]  # the output's, and the task that builds it

    def write(self, shard: Shard) -> dict[str, Any]:
        """Merge the tensors of one file, which appears when it is complete; return its record."""
        if not self.work.path.is_dir():
            raise FileNotFoundError(
                f"Machine {gethostname()} of the cluster does not see {self.work.path}; choose an "
                "output directory on storage that all machines share."
            )
        if self.work.stopped.exists():
            raise InterruptedError("The merge has been stopped.")
        register()
        torch.manual_seed(self.options.random_seed or 0)
        torch.set_num_threads(self.options.num_threads or 1)
        for checkpoints, survey in self.surveys.items():
            SURVEYS.begin(checkpoints, survey)
        with (
            TemporaryDirectory(prefix="unfinished-", dir=self.work.path) as unfinished,
            noted() as entries,
        ):
            writer = self._execute(shard, unfinished)
            require_in_range(Path(unfinished), self.out_dtype)
            (path,) = Path(unfinished).iterdir()
            file = path.rename(path.with_name(shard.file))
            record = {
                "tensors": list(writer.weight_map),
                "size": writer.total_size,
                "entries": as_json(entries),
            }
            require_unchanged(self.inputs)
            self.work.keep(file.name, record, [file])
        return record

    def _execute(self, shard: Shard, directory: str) -> TensorWriter:
        """Run MergeKit's executor and writer; return the writer, which knows what it wrote."""
        writer_task = TensorWriterTask(
            out_path=directory,
            max_shard_size=0,
            safe_serialization=self.options.safe_serialization,
        )
        saves = tuple(save.model_copy(update={"writer_task": writer_task}) for save in shard.saves)
        finalize = FinalizeModel(tensor_save_tasks=saves, writer_task=writer_task)
        universe = TaskUniverse()
        device = torch.device(self.options.device or "cpu")
        executor = Executor(
            [universe.add_task(task) for task in (writer_task, finalize)],
            math_device=device,
            storage_device=device if self.options.low_cpu_memory else torch.device("cpu"),
            cached_values={universe.add_task(task): info for task, info in self.tokenizer.items()},
        )
        results = executor.run(quiet=self.options.quiet, desc=f"Merging {shard.file}")
        writer: TensorWriter = dict(results)[writer_task]
        return writer


def as_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return entries as JSON types, with the names of models."""
    return [asdict(replace(it, experts=tuple(map(str, it.experts)))) for it in entries]


def entries_of(records: Iterable[Mapping[str, Any]], config: MergeConfiguration) -> list[Entry]:
    """Return the entries in the records of files, with the models of a config."""
    models = {str(model): model for model in config.referenced_models()}
    return [
        replace(entry, experts=tuple(models[str(name)] for name in entry.experts))
        for record in records
        for entry in _ENTRIES.validate_python(record["entries"])
    ]


def merge_by_shard(
    job: Job, plan: Plan, work: Work, inputs: dict[str, Stat], mapper: RayMapper | None
) -> None:
    """Merge file by file of the output; the bytes are those of MergeKit's ``run_merge``.

    Files that are complete are not merged again. On a cluster, whose machines share the work
    directory, each task runs with the number of threads that PyTorch has in this process
    (``--num-threads``), and reserves that many CPUs.
    """
    outputs, records, threads = plan.outputs, work.records, torch.get_num_threads()
    info = outputs.tokenizer_info
    quiet = mapper is not None or not job.progress
    options = job.options.model_copy(update={"num_threads": threads, "quiet": quiet})
    to_do = {name: file for name, file in plan.files.items() if name not in records}
    surveys = _take_surveys(to_do.values(), job, mapper or in_this_process)
    merge = ShardMerge(
        work=work,
        inputs={} if mapper else inputs,  # other machines may have copies
        options=options,
        out_dtype=job.parsed.out_dtype,
        surveys=surveys if mapper else {},  # this process has them
        tokenizer={outputs.tokenizer: info} if outputs.tokenizer and info else {},
    )
    shards = [Shard(name, [it.merge.save for it in file]) for name, file in to_do.items()]
    if mapper:
        written = mapper(merge.write, shards, run=1, cpus=threads, stop=work.stopped)
    else:
        written = in_this_process(merge.write, shards)
    bar = tqdm.tqdm(
        written,
        "Merging",
        len(plan.files),
        initial=len(records),
        unit="file",
        disable=not (mapper and job.progress),
    )
    with closing(written):
        for shard, record in zip(shards, bar, strict=True):
            records[shard.file] = record
    in_order = {name: records[name] for name in plan.files}
    job.entries.extend(entries_of(in_order.values(), job.parsed))
    if len(in_order) > 1:
        _write_index(work.merged, in_order, options)
    _write_model_files(job, outputs, work.merged)


def _take_surveys(
    files: Iterable[list[OutputTensor]], job: Job, mapper: Mapper
) -> dict[Checkpoints, Survey]:
    """Take all surveys that the merge of some files will need."""
    wanted = set()
    for tensor in chain.from_iterable(files):
        if not tensor.merge.granularity.needs_survey:
            continue
        base = tensor.merge.task.base_model
        experts = tuple(canonical(tensor.stored.keys() - {base}))
        if base in tensor.stored and experts and tensor.merged_dtype.is_floating_point:
            assert base is not None
            wanted.add(Checkpoints(base, experts))
    device = job.options.device or "cpu"
    return {each: SURVEYS.survey_of(each, device, job.progress, mapper) for each in wanted}


def _write_index(
    directory: Path, records: Mapping[str, dict[str, Any]], options: MergeOptions
) -> None:
    """Write the index of several weight files, as MergeKit's writer does."""
    weight_map = {name: file for file, it in records.items() for name in it["tensors"]}
    metadata = {
        "total_size": sum(record["size"] for record in records.values()),
        "mergekit_version": version("mergekit"),
    }
    index = directory / f"{'.'.join(_only_file(options))}.index.json"
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    index.write_text(content, encoding="utf-8")


def _write_model_files(job: Job, outputs: Outputs, directory: Path) -> None:
    """Write all files but the weights, with the functions and in the order of ``run_merge``."""
    config, options, architecture = job.parsed, job.options, outputs.architecture
    model_config = model_out_config(config, architecture, options.trust_remote_code)
    info = outputs.tokenizer_info
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
            LOG.error("Failed to copy tokenizer (%s); copy its files into the merge.", error)
    copy_tagalong_files(config, str(directory), architecture.tagalong_files or [], options)
