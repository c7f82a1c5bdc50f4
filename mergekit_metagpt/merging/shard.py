"""One weight file of the output, which any process can merge and write."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory

import torch
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import FinalizeModel, SaveTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.mergekit_private import shard_name
from mergekit_metagpt.merging.ranges import require_in_range
from mergekit_metagpt.method.merge_method import register
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Entry

UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class Shard:
    """A file of the output: its number, from 1, and MergeKit's tasks that fill it."""

    number: int
    saves: tuple[SaveTensor, ...]


@dataclass(frozen=True)
class Written:
    """What a task has done: its file, the tensors in it, their bytes, and an entry for each."""

    number: int
    file: str
    tensors: tuple[str, ...]
    size: int
    entries: Sequence[Entry]


@dataclass(frozen=True)
class ShardMerge:
    """What a worker needs to know to merge any part of the plan.

    Attributes:
        directory: where the output is gathered.
        options: MergeKit's.
        out_dtype: the config's, if numbers can be too large for it; else None.
        seed: the seed of the random numbers.
        threads: how many threads PyTorch uses.
        surveys: the squared norms that coefficients come from.
        tokenizer: the task that builds the output's tokenizer, if there is one, and its result.
        quiet: whether MergeKit's progress bar is off.
    """

    directory: Path
    options: MergeOptions
    out_dtype: str | None
    seed: int
    threads: int
    surveys: dict[Checkpoints, Survey]
    tokenizer: Mapping[BuildTokenizer, TokenizerInfo]
    quiet: bool

    def write(self, shard: Shard) -> Written:
        """Merge the tensors of one file, which appears when it is complete."""
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"Machine {gethostname()} of the cluster does not see {self.directory}; choose an "
                "output directory on storage that all machines share."
            )
        register()
        torch.manual_seed(self.seed)
        torch.set_num_threads(self.threads)
        SESSION.surveys.adopt(self.surveys)
        with (
            TemporaryDirectory(prefix=UNFINISHED, dir=self.directory) as unfinished,
            SESSION.journal() as entries,
        ):
            writer = self._execute(shard, unfinished)
            require_in_range(Path(unfinished), self.out_dtype)
            (path,) = Path(unfinished).iterdir()
            file = shard_name(path.name, shard.number)
            os.replace(path, self.directory / file)
        return Written(shard.number, file, tuple(writer.weight_map), writer.total_size, entries)

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
        results = executor.run(quiet=self.quiet, desc=f"Merging file {shard.number}")
        writer: TensorWriter = dict(results)[writer_task]
        return writer
