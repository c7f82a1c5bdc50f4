"""The cost of surveys and merges on a Ray cluster: `python -m benchmarks.cluster`.

Times both on this machine: in this process, and on Ray with one and with two workers of one
thread. Fits a cost model to the runs with one worker, compares its prediction with the runs with
two, and predicts the cost of a merge of a trillion parameters. Writes
benchmarks/results/cluster.md.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import ray
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions

from benchmarks.cluster_costs import Line, Machines, Model, Times, Work
from benchmarks.families import make_family, sized
from benchmarks.machine import described
from benchmarks.results_file import write_measured
from benchmarks.timing import weight_bytes
from mergekit_metagpt.api.functions import merged
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.loaders import set_up_worker
from mergekit_metagpt.workers import Mapper, RayMapper, in_this_process

EXPERTS = 3
SHARDS = 20
WORKERS = (1, 2)
ROUNDS = 3
GB = 1e9

TRILLION = Work(read=4 * 2e12, written=2e12, shard=5e9)
CLUSTERS = [
    Machines(1, 64, 7 * GB),  # one machine with NVMe disks
    Machines(4, 64, 3 * GB, 10 * GB),  # 25 Gbit/s per node, a file server of 100 Gbit/s
    Machines(16, 64, 12 * GB, 100 * GB),  # 100 Gbit/s per node, a parallel file system
    Machines(16, 4, 12 * GB, 100 * GB),  # the same, with few cores
]


@dataclass(frozen=True)
class Family:
    """A base and its experts on disk, in bfloat16, and the merge of them."""

    models: list[Path]
    work: Work

    @classmethod
    def make(cls, directory: Path, parameters: int) -> "Family":
        """Write the models."""
        models = make_family(directory, sized(parameters), EXPERTS)
        size = weight_bytes(models[:1])
        return cls(models, Work(len(models) * size, size, size / SHARDS))

    def survey(self, mapper: Mapper) -> None:
        """Measure the task vectors."""
        base, *experts = (ModelReference(model=ModelPath(path=str(it))) for it in self.models)
        Checkpoints(base, tuple(experts)).survey("cpu", False, mapper=mapper)

    def merge(self, ray: str | None = None) -> None:
        """Merge at granularity tensor, which needs no survey."""
        raw = {
            "merge_method": "metagpt",
            "base_model": str(self.models[0]),
            "models": [{"model": str(path)} for path in self.models[1:]],
            "out_dtype": "bfloat16",
        }
        with tempfile.TemporaryDirectory(dir=self.models[0].parent) as out:
            merged(raw, Path(out, "merged"), self.options, ray=ray)

    @property
    def options(self) -> MergeOptions:
        """MergeKit's options."""
        size = math.ceil(self.work.shard)
        return MergeOptions(
            quiet=True, copy_tokenizer=False, write_model_card=False, out_shard_size=size
        )


def seconds(action: Callable[[], None]) -> float:
    """Return the shortest of several runs, after one that warms up workers and files."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def here(family: Family) -> Times:
    """Time this process, with as many threads as PyTorch chooses."""
    return Times(seconds(lambda: family.survey(in_this_process)), seconds(family.merge))


def on_ray(family: Family) -> Times:
    """Time the cluster that this process is connected to."""
    mapper = RayMapper(None, partial(set_up_worker, family.options))
    return Times(seconds(lambda: family.survey(mapper)), seconds(lambda: family.merge("")))


@contextmanager
def workers(count: int) -> Iterator[None]:
    """Connect to a cluster with this number of workers, of one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(
        "local", num_cpus=count, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
        torch.set_num_threads(threads)


Runs = dict[tuple[int, Work], Times]


def measure(families: list[Family]) -> Runs:
    """Time surveys and merges, by number of workers; 0 stands for this process."""
    times = {(0, family.work): here(family) for family in families}
    for count in WORKERS:
        with workers(count):
            times |= {(count, family.work): on_ray(family) for family in families}
    return times


def fitted(runs: Runs) -> Model:
    """Return the model that passes through the runs of one worker."""
    less, more = sorted((work.read, work, run) for (n, work), run in runs.items() if n == 1)
    return Model(
        Line.through(*((w.read, t.survey) for _, w, t in (less, more))),
        Line.through(*((w.read + w.written, t.merge) for _, w, t in (less, more))),
    )


def measured_rows(runs: Runs, model: Model) -> Iterator[str]:
    """Yield a row of Markdown for each run, with the prediction of the model."""
    for (count, work), run in runs.items():
        predicted = model.predict(work, Machines(1, count)) if count else None
        cells = [f"Ray, {count}" if count else "this process", f"{work.read / GB:.2f}"]
        for size, took, expected in (
            (work.read, run.survey, predicted and predicted.survey),
            (work.read + work.written, run.merge, predicted and predicted.merge),
        ):
            cells += [f"{took:.2f}", f"{size / GB / took:.2f}"]
            cells.append(f"{expected:.2f} ({expected / took - 1:+.0%})" if expected else "")
        yield f"| {' | '.join(cells)} |"


def predicted_rows(model: Model) -> Iterator[str]:
    """Yield a row of Markdown for each of the clusters."""
    for machines in CLUSTERS:
        times = model.predict(TRILLION, machines)
        shared = machines.shared_rate / GB
        cells = [
            f"{machines.nodes}", f"{machines.cores}", f"{machines.node_rate / GB:.0f}",
            "no limit" if math.isinf(shared) else f"{shared:.0f}",
            f"{times.survey / 60:.1f}", f"{times.merge / 60:.1f}",
            f"{(times.survey + times.merge) / 60:.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def report(runs: Runs, model: Model) -> str:
    """Return the results as Markdown."""
    lines = "\n".join
    return f"""# Surveys and merges on a Ray cluster

A base and {EXPERTS} experts in bfloat16, method `metagpt`, {SHARDS} output files; the least of {ROUNDS}
runs, files in the page cache. {described()}, Ray {ray.__version__}.
"This process" has {torch.get_num_threads()} threads, a worker of Ray one. Rates of merges count what is read
and what is written. Written by `python -m benchmarks.cluster`.

| workers | models, GB | survey, s | GB/s | predicted, s | merge, s | GB/s | predicted, s |
|---|---|---|---|---|---|---|---|
{lines(measured_rows(runs, model))}

Predicted is F + B / min(r N c, N d, S): N nodes of c cores, storage of d bytes per second at each node
and S for all, here without a limit. F and r are those of the line through the two runs of one worker:
surveys {model.survey.fixed:.2f} s and {model.survey.rate / GB:.2f} GB/s, merges {model.merge.fixed:.2f} s \
and {model.merge.rate / GB:.2f} GB/s.

## A trillion parameters, predicted

A base and three experts in bfloat16: {TRILLION.read / 1e12:.0f} TB read by the survey, as much again by \
the merge, and
{TRILLION.written / 1e12:.0f} TB written, in files of {TRILLION.shard / GB:.0f} GB.

| nodes | cores each | GB/s each | GB/s shared | survey, min | merge, min | both, min |
|---|---|---|---|---|---|---|
{lines(predicted_rows(model))}
"""  # noqa: E501, a table


@click.command()
@click.option("--parameters", default=300_000_000, show_default=True, help="Of the larger models.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where the models are made.")
def main(parameters: int, directory: Path | None) -> None:
    """Measure, compare with the cost model, extrapolate and record."""
    with tempfile.TemporaryDirectory(dir=directory) as models:
        families = [
            Family.make(Path(models, str(size)), size) for size in (parameters, parameters // 4)
        ]
        runs = measure(families)
    text = report(runs, fitted(runs))
    write_measured("cluster.md", text)
    print(text)


if __name__ == "__main__":
    main()
