"""A merge's output: complete or absent, locked, and resumed by itself with the same bytes."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import WHOLE, files, merge_config, names, on_posix, run, save_tokenizer, write_yaml
from conftest import invoke_merge as merge
from filelock import FileLock
from mergekit.options import MergeOptions

import mergekit_metagpt
from mergekit_metagpt.merging.by_shard import ShardMerge
from mergekit_metagpt.method import merge_method
from mergekit_metagpt.planning.directory import Output

SHARDS = ("--out-shard-size", 30000)
SHARD = "model-0000{}-of-00005.safetensors".format
FOLDER = "additional_chat_templates"
RANDOM = {"granularity": "model", "density": 0.5}
KEY = "0123456789abcdef"

KILLED = """
import os, signal, sys
from pathlib import Path
from conftest import invoke_merge
from mergekit_metagpt.merging import by_shard
from mergekit_metagpt.planning import directory

config, place = sys.argv[1], Path(sys.argv[2])
moments = {  # in place of which call the process dies
    "while-the-third-file-is-written": (by_shard, "require_in_range", 3),
    "before-the-third-file-has-its-record": (directory, "_write_whole", 4),
    "before-it-is-published": (directory.Output, "publish", 1),
    "in-the-middle-of-its-move": (directory.os, "rename", 12),
    "while-the-rest-goes": (directory.Work, "remove", 1),
}

def merge(out):
    invoke_merge(config, out, "--out-shard-size", "30000")

merge(place / "whole")  # also imports for all children what a merge needs
for moment, (module, name, number) in moments.items():
    out, real, calls = place / moment / "merged", getattr(module, name), []
    (out if "move" in moment else out.parent).mkdir(parents=True)

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    child = os.fork()
    if not child:
        setattr(module, name, function)
        merge(out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL, moment
"""
MOMENTS = {
    "while-the-third-file-is-written": 2,
    "before-the-third-file-has-its-record": 2,
    "before-it-is-published": 5,
    "in-the-middle-of-its-move": 5,
}


@pytest.fixture(scope="module")
def config(family, tmp_path_factory):
    yml = tmp_path_factory.mktemp("config") / "metagpt.yml"
    return write_yaml(yml, merge_config(family, "metagpt_dare_linear", parameters=RANDOM))


@pytest.fixture(scope="module")
def whole_merge(config, tmp_path_factory):
    """The files of a merge that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "merged"
    merge(config, out, *SHARDS)
    return files(out)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """A directory with an output for each moment at which a merge was killed."""
    place = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = run(sys.executable, "-c", KILLED, config, place, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "merged"


@pytest.fixture
def merged_now(monkeypatch) -> list[str]:
    """The files that are merged from now on."""
    merged: list[str] = []
    write = ShardMerge.write
    monkeypatch.setattr(
        ShardMerge, "write", lambda self, shard: merged.append(shard.file) or write(self, shard)
    )
    return merged


@pytest.fixture
def stopped(config, out, monkeypatch):
    """Let a merge stop with two of its five files; return what it said."""

    def stop(error: BaseException, yml: Path = config, *words) -> str:
        write = ShardMerge.write

        def until_the_third(self, shard):
            if "00003" in shard.file:
                raise error
            return write(self, shard)

        with monkeypatch.context() as patch:
            patch.setattr(ShardMerge, "write", until_the_third)
            return merge(yml, out, *SHARDS, *words, status=1).stderr

    return stop


FULL = OSError("No space left")
REST = [SHARD(3), SHARD(4), SHARD(5)]  # of a merge that was stopped
# Why a merge stops with two files, what happens then, and how many are complete after it.
STOPS = [
    (FULL, lambda *_: None, 2),
    (KeyboardInterrupt("stopped by SIGTERM"), lambda *_: None, 2),
    (ValueError("NaN"), lambda out, _: out.mkdir(), 2),
    (FULL, lambda _, work: os.truncate(work.merged / SHARD(2), 20000), 1),
    (FULL, lambda _, work: (work.complete / f"{SHARD(2)}.json").write_text(""), 1),
    (FULL, lambda _, work: shutil.copytree(work.complete, work.merged / FOLDER), 2),
]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
class TestKilled:
    @pytest.mark.parametrize(("moment", "complete"), MOMENTS.items())
    def test_the_same_command_goes_on_and_ends_with_the_same_bytes(
        self, moment, complete, config, killed, whole_merge, merged_now
    ):
        out = killed / moment / "merged"
        merge(config, out, *SHARDS)
        assert merged_now == [SHARD(number) for number in range(complete + 1, 6)]
        assert files(out) == whole_merge
        assert names(out.parent) == {"merged"}

    def test_after_it_is_published_it_is_complete(self, config, killed, whole_merge):
        out = killed / "while-the-rest-goes" / "merged"
        assert files(out) == whole_merge
        assert "is not empty" in merge(config, out, *SHARDS, status=1).stderr


class TestStopped:
    @pytest.mark.parametrize(("error", "then", "complete"), STOPS)
    def test_no_exception_deletes_what_is_complete_and_what_is_not_is_merged_again(
        self, error, then, complete, stopped, config, out, whole_merge, merged_now, caplog
    ):
        assert str(error) in stopped(error)
        (work,) = Output.of(out).works()
        assert f"(2 of its weight files) is kept in {work.path}; run the same" in caplog.text
        assert set(work.records) == names(work.merged) == {SHARD(1), SHARD(2)}
        then(out, work)
        assert len(work.records) == complete
        del merged_now[:]
        merge(config, out, *SHARDS)
        assert merged_now == [SHARD(number) for number in range(complete + 1, 6)]
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        assert files(out) == whole_merge
        assert names(out.parent) == {"merged"}

    @pytest.mark.parametrize("exists", [False, True])
    def test_with_nothing_complete_nothing_is_left(self, exists, config, out, monkeypatch):
        (out if exists else out.parent).mkdir(parents=True)
        monkeypatch.setattr("mergekit_metagpt.merging.by_shard.require_in_range", 1 / 1)
        merge(config, out, *SHARDS, status=1)
        assert not names(out if exists else out.parent)

    def test_another_merge_into_an_output_that_exists_moves_it_out_and_it_goes_on(
        self, stopped, config, out, whole_merge, merged_now, caplog
    ):
        out.mkdir(parents=True)
        stopped(FULL)
        (inside,) = Output.of(out).works()
        merge(config, out, *SHARDS, "--random-seed", 8)
        assert names(out) == whole_merge.keys()
        (beside,) = Output.of(out).works()
        assert beside.path == out.parent / inside.path.name
        assert f"{beside.path} holds another merge that has not been finished" in caplog.text
        shutil.rmtree(out)
        del merged_now[:]
        merge(config, out, *SHARDS)
        assert merged_now == REST
        assert files(out) == whole_merge

    def test_a_stock_method_is_not_merged_again_if_only_its_tokenizer_failed(
        self, family, out, tmp_path, monkeypatch
    ):
        yml = write_yaml(
            tmp_path / "ties.yml", merge_config(family, "ties", parameters={"weight": 1})
        )
        with monkeypatch.context() as patch:
            patch.setattr("mergekit_metagpt.merging.whole.merge_record", None)
            merge(yml, out, status=1)
        monkeypatch.setattr("mergekit_metagpt.merging.whole.run_merge", None)
        merge(yml, out)
        assert names(out.parent) == {"merged"}


WORDS = [f"w{number}" for number in range(63)]
# Other words of the command, or what else changes.
OTHER_MERGES = {
    "another seed": ("--random-seed", 8),
    "other threads": ("--num-threads", 2),
    "another way of writing": ("--async-write",),
    "another config": lambda own, yml: yml.write_text(yml.read_text().replace("0.5", "0.6")),
    "a model trained on": lambda own, yml: shutil.copy(
        f"{own['a']}/model.safetensors", f"{own['b']}/model.safetensors"
    ),
    "another tokenizer": lambda own, yml: save_tokenizer(own["base"], *reversed(WORDS)),
}


@pytest.mark.parametrize("what", OTHER_MERGES)
def test_another_merge_has_another_directory_and_deletes_nothing(
    what, stopped, own, out, tmp_path, caplog
):
    for path in own.values():
        save_tokenizer(path, *WORDS)
    raw = merge_config(own, "metagpt_dare_linear", parameters=RANDOM)
    yml = write_yaml(tmp_path / "metagpt.yml", {**raw, "tokenizer": {"source": "base"}})
    stopped(FULL, yml)
    (work,) = Output.of(out).works()
    before = {path: path.read_bytes() for path in work.path.rglob("*") if path.is_file()}
    threads, change, words = torch.get_num_threads(), OTHER_MERGES[what], ()
    if callable(change):
        change(own, yml)
    else:
        words = change
    merge(yml, out, *SHARDS, *words)
    torch.set_num_threads(threads)
    assert f"{work.path} holds another merge that has not been finished" in caplog.text
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_seed_the_same_merge_has_the_same_one(family, tmp_path):
    raw = merge_config(family, "metagpt_dare_linear", parameters=RANDOM)
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    seeds = [
        mergekit_metagpt.merge(config, tmp_path / name, options=options).record["seed"]
        for name, config in {"a": raw, "b": raw, "c": {**raw, "dtype": "bfloat16"}}.items()
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_file_and_its_record_are_on_the_disk_before_they_count(config, out, monkeypatch):
    """After a power cut, a record stands for a file that is whole, under its name."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(source, target):
        events.append(("replaced", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    merge(config, out, *SHARDS)
    for file in map(SHARD, range(1, 6)):
        start = events.index(("synced", file))
        record = file.replace(".safetensors", ".safetensors.part")
        assert events[start : start + 6] == [
            ("synced", file),
            ("replaced", file),
            ("synced", "merged"),
            ("synced", record),
            ("replaced", f"{file}.json"),
            ("synced", "complete"),
        ]


class TestTheLock:
    @pytest.mark.parametrize("exists", [False, True, "since the first merge began"])
    def test_a_second_merge_into_the_same_output_says_so_at_once(self, exists, config, out):
        (out if exists else out.parent).mkdir(parents=True)
        place = out if exists is True else out.parent
        with FileLock(place / "merged.metagpt-lock"):
            if isinstance(exists, bool):  # the first merge may only just have begun
                (place / f"merged.metagpt-{KEY}" / "complete").mkdir(parents=True)
            before = names(place)
            done = merge(config, out, status=1)
            assert done.stderr.startswith(f"Error: Another merge is writing {out}; wait")
            assert names(place) == before

    @on_posix
    def test_without_locks_it_merges_and_warns(self, config, out, monkeypatch, caplog):
        def flock(*_):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr("fcntl.flock", flock)
        merge(config, out)
        assert f"{out} cannot be locked" in caplog.text
        assert names(out) == WHOLE

    def test_only_directories_of_this_output_are_its_work(self, config, out):
        for name in (
            f"merged.metagpt-{KEY}",
            f"merged.metagpt-{KEY}.removed",
            f"merged.metagpt-{KEY}x",
            f"else.metagpt-{KEY}",
            "merged.metagpt-backup",
        ):
            (out.parent / name).mkdir(parents=True)
        before = names(out.parent)
        assert Output.of(out).works() == []
        merge(config, out)
        assert names(out.parent) == before | {"merged"}


@pytest.fixture
def handled():
    """A handler of SIGHUP, for tests that may have been started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGHUP, before)


@on_posix
def test_a_second_signal_does_not_stop_it_from_tidying_up(handled, config, out, monkeypatch):
    number, rmtree = signal.SIGHUP, shutil.rmtree

    def stop(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("still running")

    def again(*args, **options):
        os.kill(os.getpid(), number)
        rmtree(*args, **options)

    monkeypatch.setattr(merge_method, "note", stop)
    monkeypatch.setattr(shutil, "rmtree", again)
    done = merge(config, out, status=1)
    assert done.stderr.strip() == "Error: This command was stopped by SIGHUP."
    assert not names(out.parent)
    assert signal.getsignal(number) is handled


@on_posix
def test_a_merge_that_was_started_with_nohup_goes_on(handled, config, out, monkeypatch):
    note = merge_method.note

    def hang_up(*merged):
        os.kill(os.getpid(), signal.SIGHUP)
        note(*merged)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(merge_method, "note", hang_up)
    merge(config, out)
    assert names(out.parent) == {"merged"}
