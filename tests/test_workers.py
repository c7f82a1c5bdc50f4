"""Surveys on a Ray cluster: the same bits as here, and a command that can be stopped."""

import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    checkpoints,
    edit,
    invoke,
    llama_config,
    merge_config,
    on_posix,
    run,
    save_family,
    write_yaml,
)
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.loaders import set_up_worker
from mergekit_metagpt.workers import RayMapper, in_this_process

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("cluster")]


def survey(paths, mapper=in_this_process, products=True):
    return checkpoints(paths).survey("cpu", False, products, mapper)


@pytest.fixture
def on_ray():
    return RayMapper(None, partial(set_up_worker, MergeOptions()))


def test_any_number_of_workers_measures_the_same_bits(tmp_path, on_ray):
    """Of tied embeddings and several shards."""
    config = llama_config(tie_word_embeddings=True, num_hidden_layers=6)
    paths = save_family(tmp_path, config, scales=(0.01, 0.02, 0.03), max_shard_size="60KB")
    assert len(list(Path(paths["base"]).glob("*.safetensors"))) > 2
    expected = survey(paths)
    assert survey(paths, partial(on_ray, cpus=2)) == expected  # one at a time
    assert survey(paths, on_ray) == expected
    assert survey(paths, on_ray, products=False) == survey(paths, products=False)


def test_a_worker_is_set_up_once_for_each_call(tmp_path):
    def set_up():
        with open(tmp_path / "set up", "a") as file:
            file.write(f"{os.getpid()} ")

    mapper = RayMapper(None, set_up)
    for calls in (1, 2):
        assert list(mapper(abs, range(-20, 0))) == [*range(20, 0, -1)]
        workers = (tmp_path / "set up").read_text().split()
        assert len(workers) <= calls * len(set(workers))


def test_changed_files_are_read_anew_by_the_same_workers(own, on_ray):
    before = survey(own, on_ray)
    edit(own["a"], lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    after = survey(own, on_ray)
    assert after != before
    assert after == survey(own)


def test_the_command_prints_the_same_bytes(family, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(family["base"]).parent)
    names = {name: name for name in family}  # relative paths, which workers are to find
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(names))
    words = ["coefficients", config, "--json", "--granularity", "model"]
    found = invoke(*words, "--ray").stdout
    assert json.loads(found)["parameters"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no survey is kept
    assert invoke(*words).stdout == found


def test_without_ray_or_a_cluster_there_is_one_sentence(config, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    done = invoke("coefficients", config, "--ray", "127.0.0.1:1", status=1)
    assert "No Ray cluster could be reached at 127.0.0.1:1: " in done.stderr
    assert done.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    done = invoke("coefficients", config, "--ray", status=1)
    assert "pip install 'mergekit-metagpt[ray]'" in done.stderr
    assert done.stderr.count("\n") == 1


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import click
from mergekit_metagpt.workers import RayMapper

address, number, failed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

@click.command()
def stopped():
    here = os.getpid()
    def work(item):
        if item:
            failed.touch()
            raise ValueError("of a task that nobody asks for any more")
        while not failed.exists():
            time.sleep(0.01)
        os.kill(here, number)
        time.sleep(600)  # the cluster ends the tasks of a process that is gone
    print(list(RayMapper(address, dict)(work, [0, 1], run=1, cpus=0.1)))

stopped([])
"""


@on_posix
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "\nAborted!\n"), (signal.SIGTERM, "")]
)
def test_a_command_that_is_stopped_ends_in_order(number, said, cluster, tmp_path):
    words = [cluster, str(int(number)), tmp_path / "failed"]
    done = run(sys.executable, "-c", STOPPED, *words)
    # Sometimes a line of Ray's own core comes too late to be sent anywhere else.
    printed = re.sub(
        r"^\[.* task_manager.cc:.* Failed to push error .*\n", "", done.stderr, flags=re.M
    )
    # Ray makes every code of an exit one, if it comes while a result is waited for.
    assert (done.returncode, done.stdout, printed) == (1, "", said)
