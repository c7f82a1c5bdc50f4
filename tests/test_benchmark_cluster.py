"""The model of what a cluster takes, on round figures."""

import pytest

from benchmarks.cluster_costs import Line, Machines, Model, Times, Work

MODEL = Model(survey=Line(fixed=1, rate=2), merge=Line(fixed=3, rate=1))
WORK = Work(read=4000, written=1000, shard=100)


def test_a_line_passes_through_its_runs():
    line = Line.through((100, 3.0), (300, 7.0))
    assert line == Line(fixed=1, rate=50)
    assert line.seconds(300, cores=1, storage=1e9) == 7
    assert line.seconds(300, cores=2, storage=1e9) == 4


def test_cores_bound_where_storage_does_not():
    assert MODEL.predict(WORK, Machines(2, 5)) == Times(1 + 4000 / 20, 3 + 5000 / 10)


@pytest.mark.parametrize("machines", [Machines(2, 5, node_rate=2), Machines(2, 5, 9, 4)])
def test_storage_bounds_at_each_node_or_for_all(machines):
    assert MODEL.predict(WORK, machines) == Times(1 + 4000 / 4, 3 + 5000 / 4)


def test_a_merge_keeps_no_more_cores_busy_than_there_are_output_files():
    assert MODEL.predict(WORK, Machines(10, 10)).merge == 3 + 5000 / 10
    assert MODEL.predict(WORK, Machines(1, 7)).merge == 3 + 5000 / 5  # two rounds of at most 7
