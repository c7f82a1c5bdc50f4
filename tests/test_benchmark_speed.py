"""The benchmarks of speed: what they run and how they count, not how fast it is."""

from pathlib import Path

import pytest
from conftest import llama_config, save_family
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get

from benchmarks.cold import memory_limit
from benchmarks.families import make_family, sized
from benchmarks.scaling import CASES
from benchmarks.speed import (
    OF_A_BLOCK,
    QUICK,
    SLOW,
    Series,
    on_gpu,
    shares_table,
    table,
    timed_series,
)
from benchmarks.timing import Case, interleaved, machine_limits, weight_bytes

ALL = [*QUICK, *SLOW, *OF_A_BLOCK, *CASES, *on_gpu("cuda")]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_mergekit_takes_every_config(case, tmp_path):
    paths = [tmp_path / name for name in ("base", "a", "b")]
    config = MergeConfiguration.model_validate(case.config(paths, "bfloat16"))
    known = {spec.name for spec in get(config.merge_method).spec.parameters}
    assert set(config.parameters or {}) <= known
    assert config.base_model is None or config.merge_method != "linear"


def test_counterparts_are_timed_in_the_same_rounds():
    for cases in (QUICK, SLOW, OF_A_BLOCK, on_gpu("cuda")):
        names = {case.name for case in cases}
        assert {case.counterpart for case in cases} - {None} <= names


def test_a_merge_is_timed_in_a_process_of_its_own_and_leaves_nothing(tmp_path):
    paths = [Path(path) for path in save_family(tmp_path, llama_config()).values()]
    run = Case("metagpt", "metagpt").run(paths, "float32")
    assert 0 < run["seconds"] < run["cpu_seconds"] + 60
    assert run["peak_bytes"] > weight_bytes(paths)
    assert not (paths[0].parent / "merged").exists()


def test_a_merge_that_fails_is_no_figure(tmp_path):
    with pytest.raises(RuntimeError, match="metagpt failed"):
        Case("metagpt", "metagpt").run([tmp_path / "base", tmp_path / "expert"], "float32")


def test_runs_take_turns_and_the_first_round_is_left_out():
    order: list[str] = []
    actions = {name: lambda name=name: {"n": order.append(name) or len(order)} for name in "ab"}
    runs = interleaved(actions, rounds=2, label="")
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert runs == {"a": [{"n": 3}, {"n": 6}], "b": [{"n": 4}, {"n": 5}]}


def test_ratios_are_those_of_medians():
    runs = {
        name: [
            {"seconds": s, "cpu_seconds": cpu, "peak_bytes": peak, "disk_bytes": 3e9}
            for s in seconds
        ]
        for name, cpu, peak, seconds in [
            ("stock", 4.0, 2e9, (1.0, 2.0, 9.0)),
            ("ours", 3.0, 1e9, (1.0, 1.0, 5.0)),
        ]
    }
    text = table([Case("stock", "x"), Case("ours", "y", "stock")], runs, moved=4_000_000_000)
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
    assert "0.50 s for the same bytes" in text
    assert "| `ideal` | 0.50 | 100.0 % |" in text
    assert "| `real` | 4.00 | 12.5 % |" in text


def test_files_are_dropped_from_memory_before_each_run(tmp_path):
    paths = make_family(tmp_path, sized(1_000_000), experts=1)
    case = Case("metagpt", "metagpt")
    series = Series("cold", str(tmp_path), [case], 1_000_000, rounds=1, warm_up=0, is_cold=True)
    runs = timed_series(series, paths, "float32")
    assert runs.keys() == {case.name, *machine_limits(paths)}
    read = [run["disk_bytes"] for run in runs[case.name]]
    assert read == [pytest.approx(weight_bytes(paths), rel=0.2)] or read == [0]  # a disk in memory


def test_a_limit_of_memory_is_lifted_again():
    for _ in range(2):
        with memory_limit(1 << 30) as start:
            assert start is None or callable(start)


def test_the_machine_is_measured_on_the_same_files(tmp_path):
    paths = make_family(tmp_path, sized(1_000_000), experts=1)
    assert {path.name for path in paths} == {"base", "expert-1"}
    for run in machine_limits(paths).values():
        assert run()["rate"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "expert-1"}
