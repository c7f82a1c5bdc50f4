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
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import FinalizeModel, SaveTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from pydantic import TypeAdapter

from mergekit_metagpt import mergekit_private, register
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.identity import Stat, require_unchanged
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.merging.finished import require_in_range
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.summary import Entry
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.directory import Work
from mergekit_metagpt.planning.job import Job
from mergekit_metagpt.planning.planner import TensorMerge
from mergekit_metagpt.wording import reason
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process

LOG = logging.getLogger(__name__)
_ENTRIES = TypeAdapter(list[Entry])


def planned_files(job: Job) -> dict[str, list[TensorMerge]]:
    """Return the tensors that MergeKit's writer would put into each file.

    The models of the job are here, with their adapters applied.
    """
    shards, only = job.outputs.shards(job.options.out_shard_size), _only_file(job.options)
    if len(shards) == 1:
        return {only: shards[0]}
    stem, suffix = only.split(".")
    names = (f"{stem}-{n:05}-of-{len(shards):05}.{suffix}" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


def _only_file(options: MergeOptions) -> str:
    """Return the weight file that MergeKit writes if it is the only one."""
    return "model.safetensors" if options.safe_serialization else "pytorch_model.bin"


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


def entries_of(records: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Return the entries in the records of files; their experts are names."""
    return [entry for record in records for entry in _ENTRIES.validate_python(record["entries"])]


def merge_by_shard(
    job: Job,
    files: Mapping[str, list[TensorMerge]],
    work: Work,
    inputs: dict[str, Stat],
    mapper: RayMapper | None,
) -> None:
    """Merge file by file of the output; the bytes are those of MergeKit's ``run_merge``.

    Files that are complete are not merged again. On a cluster, whose machines share the work
    directory, each task runs with the number of threads that PyTorch has in this process
    (``--num-threads``), and reserves that many CPUs.
    """
    records, threads, map_ = work.records, torch.get_num_threads(), mapper or in_this_process
    task, info = job.outputs.tokenizer, job.outputs.tokenizer_info
    changes = {"num_threads": threads, "quiet": mapper is not None or not job.progress}
    to_do = {name: file for name, file in files.items() if name not in records}
    surveys = _take_surveys(to_do.values(), job, map_)
    merge = ShardMerge(
        work=work,
        inputs={} if mapper else inputs,  # other machines may have copies
        options=job.options.model_copy(update=changes),
        out_dtype=job.parsed.out_dtype,
        surveys=surveys if mapper else {},  # this process has them
        tokenizer={task: info} if task and info else {},
    )
    shards = [Shard(name, [it.save for it in file]) for name, file in to_do.items()]
    bar = tqdm.tqdm(
        desc="Merging",
        total=len(files),
        initial=len(records),
        unit="file",
        disable=not (mapper and job.progress),
    )
    with bar, closing(map_(merge.write, shards, run=1, cpus=threads, stop=work.stopped)) as written:
        for shard, record in zip(shards, written, strict=True):
            records[shard.file] = record
            bar.update()
    in_order = {name: records[name] for name in files}
    job.entries.extend(entries_of(in_order.values()))
    if len(in_order) > 1:
        _write_index(work.merged / f"{_only_file(job.options)}.index.json", in_order)
    _write_model_files(job, work.merged)


def _take_surveys(
    files: Iterable[list[TensorMerge]], job: Job, mapper: Mapper
) -> dict[Checkpoints, Survey]:
    """Take all surveys that the merge of some files will need."""
    wanted = set()
    for tensor in chain.from_iterable(files):
        if not tensor.granularity.needs_survey:
            continue
        base = tensor.task.base_model
        experts = tuple(canonical(tensor.stored.keys() - {base}))
        if base in tensor.stored and experts and tensor.merged_dtype.is_floating_point:
            assert base is not None
            wanted.add(Checkpoints(base, experts))
    device = job.options.device or "cpu"
    return {each: SURVEYS.survey_of(each, device, job.progress, mapper) for each in wanted}


def _write_index(path: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """Write the index of several weight files, as MergeKit's writer does."""
    metadata = {
        "total_size": sum(record["size"] for record in records.values()),
        "mergekit_version": version("mergekit"),
    }
    weight_map = {name: file for file, it in records.items() for name in it["tensors"]}
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    path.write_text(content, encoding="utf-8")


def _write_model_files(job: Job, directory: Path) -> None:
    """Write all files but the weights, with the functions and in the order of ``run_merge``."""
    config, options, outputs = job.parsed, job.options, job.outputs
    architecture, info = outputs.architecture, outputs.tokenizer_info
    model_config = mergekit_private.model_out_config(
        config, architecture, options.trust_remote_code
    )
    if info is not None:
        multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
        mergekit_private.update_config_vocab(model_config, architecture, info.tokenizer, multiple)
    model_config.save_pretrained(directory)
    if info is not None:
        mergekit_private.set_chat_template(info.tokenizer, config)
        info.tokenizer.save_pretrained(directory, safe_serialization=True)
    elif options.copy_tokenizer:
        try:
            mergekit_private.copy_tokenizer(config, str(directory), options)
        except Exception as error:  # tokenizers raise many kinds of errors
            said = reason(error)
            LOG.error("Failed to copy tokenizer (%s); copy its files into the merge.", said)
    tagalong = architecture.tagalong_files or []
    mergekit_private.copy_tagalong_files(config, str(directory), tagalong, options)
