"""One weight file of the output, which any process can merge and write."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import FinalizeModel, SaveTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from pydantic import TypeAdapter

from mergekit_metagpt import register
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.identity import Stat, require_unchanged
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.surveys import SURVEYS
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.summary import Entry
from mergekit_metagpt.planning.work import Work
from mergekit_metagpt.wording import BadInputError

_ENTRIES = TypeAdapter(list[Entry])


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


def require_in_range(merged: Path, out_dtype: str | None) -> None:
    """Read a merge back, and refuse it if it overflowed float16.

    In another ``out_dtype`` only numbers above 3.39e38 can overflow, which no model has; to find
    them, every such merge would be read back.
    """
    if dtype_from_name(out_dtype) != torch.float16:
        return
    overflowing = _overflowing(merged)  # by now its files are closed: Windows removes no open ones
    if overflowing:
        raise BadInputError(
            f"Merging tensor {overflowing} overflows {torch.float16}; set a wider dtype, such as "
            "out_dtype: bfloat16 or float32."
        )


def _overflowing(merged: Path) -> str | None:
    """Return the name of a tensor that is not finite, or None."""
    # Not parsed from a string: the path may contain + and @, which references use.
    reference = ModelReference(model=ModelPath(path=str(merged)))
    loader = reference.lazy_loader(lazy_unpickle=False)
    for name, _ in sorted(loader.index.tensor_paths.items(), key=itemgetter(1)):  # by shard
        tensor = loader.get_tensor(name)
        if tensor is not None and not tensor.isfinite().all():
            return name
    return None
