"""The benchmarks of speed and of clusters: what they run and how they count."""

import pytest
from conftest import on_posix
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get

from benchmarks.cluster_costs import Line, Machines, Model, Times, Work
from benchmarks.scaling import CASES
from benchmarks.speed import OF_A_BLOCK, QUICK, SLOW, on_gpu, shares_table, table
from benchmarks.timing import Case, interleaved

SERIES = [QUICK, SLOW, OF_A_BLOCK, on_gpu("cuda")]
ALL = [*CASES, *(case for cases in SERIES for case in cases)]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_mergekit_takes_every_config(case, tmp_path):
    paths = [tmp_path / name for name in ("base", "a", "b")]
    config = MergeConfiguration.model_validate(case.config(paths, "bfloat16"))
    known = {spec.name for spec in get(config.merge_method).spec.parameters}
    assert set(config.parameters or {}) <= known
    assert config.base_model is None or config.merge_method != "linear"


def test_counterparts_are_timed_in_the_same_rounds():
    for cases in SERIES:
        names = {case.name for case in cases}
        assert {case.counterpart for case in cases} - {None} <= names


@on_posix
def test_a_merge_that_fails_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "false")  # a command that fails
    with pytest.raises(RuntimeError, match="metagpt failed"):
        Case("metagpt", "metagpt").run([tmp_path / "base", tmp_path / "expert"], "float32")


def test_runs_take_turns_and_the_first_round_is_left_out():
    order: list[str] = []
    actions = {name: lambda name=name: {"n": order.append(name) or len(order)} for name in "ab"}
    runs = interleaved(actions, rounds=2, label="")
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert runs == {"a": [{"n": 3}, {"n": 6}], "b": [{"n": 4}, {"n": 5}]}


def test_ratios_are_those_of_medians():
    def runs(cpu, peak, seconds):
        its = {"cpu_seconds": cpu, "peak_bytes": peak, "disk_bytes": 3e9}
        return [{"seconds": value, **its} for value in seconds]

    found = {"stock": runs(4.0, 2e9, (1.0, 2.0, 9.0)), "ours": runs(3.0, 1e9, (1.0, 1.0, 5.0))}
    text = table([Case("stock", "x"), Case("ours", "y", "stock")], found, moved=4_000_000_000)
    assert "| `stock` | 2.00 | 1.00 to 9.00 | 4.00 | 2.00 | 3.00 | 2.00 |  |" in text
    assert "**0.50** / **0.75** / **0.50**" in text


def test_a_merge_that_only_reads_and_writes_reaches_the_whole_limit():
    runs = {
        "reading the inputs": [{"milliseconds": 300.0, "rate": 4.0}],
        "writing the output": [{"milliseconds": 200.0, "rate": 2.0}],
        "ideal": [{"seconds": 0.5}],
        "real": [{"seconds": 4.0}],
    }
    text = shares_table(runs, [Case("ideal", "x"), Case("real", "x")])
    for line in ("0.50 s for the same bytes", "`ideal` | 0.50 | 100.0 %", "`real` | 4.00 | 12.5 %"):
        assert line in text


# What a merge takes on a cluster

MODEL = Model(survey=Line(fixed=1, rate=2), merge=Line(fixed=3, rate=1))
WORK = Work(read=4000, written=1000, shard=100)


def test_a_line_passes_through_its_runs():
    line = Line.through((100, 3.0), (300, 7.0))
    assert line == Line(fixed=1, rate=50)
    assert line.seconds(300, cores=1, storage=1e9) == 7
    assert line.seconds(300, cores=2, storage=1e9) == 4


@pytest.mark.parametrize(
    ("machines", "survey", "merge"),
    [
        (Machines(2, 5), 20, 10),  # cores bound
        (Machines(2, 5, node_rate=2), 4, 4),  # storage at each node
        (Machines(2, 5, 9, 4), 4, 4),  # storage for all
        (Machines(10, 10), 200, 10),  # no more cores are busy than there are output files
        (Machines(1, 7), 14, 5),  # two rounds of at most 7
    ],
)
def test_what_bounds_a_merge_on_a_cluster(machines, survey, merge):
    assert MODEL.predict(WORK, machines) == Times(1 + 4000 / survey, 3 + 5000 / merge)
