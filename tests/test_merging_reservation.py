"""The lock of a merge's output, and what is left of a merge that fails or is stopped."""

import errno
import os
import sys
from pathlib import Path
from socket import gethostname

import pytest
from conftest import merge_config, on_posix, run, write_yaml
from filelock import FileLock
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from test_merging_whole import WHOLE, merge, names

from mergekit_metagpt.merging import whole
from mergekit_metagpt.planning.destination import Destination

TOKEN = "0123456789abcdef"


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "merged"


class TestTheLock:
    @pytest.mark.parametrize("exists", [False, True])
    def test_a_second_merge_into_the_same_output_says_so_at_once(self, exists, config, out):
        (out if exists else out.parent).mkdir(parents=True)
        destination = Destination.of(out)
        running = destination.new_partial()
        with FileLock(destination.lock):
            running.mark.touch()
            running.path.mkdir()
            before = names(destination.workplace)
            done = merge(config, out, status=1)
            assert done.stderr.startswith(f"Error: Another merge is writing {out}; wait")
            assert names(destination.workplace) == before

    def test_an_output_that_appeared_since_the_check_is_not_merged_into(self, family, out):
        out.mkdir(parents=True)
        (out / "notes.txt").touch()
        with pytest.raises(ValueError, match="is not empty"):
            whole.merge_whole(
                MergeConfiguration.model_validate(merge_config(family)), "", out, MergeOptions()
            )
        assert names(out) == {"notes.txt"}

    @on_posix
    def test_without_locks_it_merges_warns_and_removes_nothing(
        self, config, out, monkeypatch, caplog
    ):
        out.parent.mkdir()
        leftover = Destination.of(out).new_partial()
        leftover.mark.write_text(gethostname())
        leftover.path.mkdir()

        def flock(*_):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr("fcntl.flock", flock)
        merge(config, out)
        assert f"{out} cannot be locked" in caplog.text
        assert names(out) == WHOLE
        assert leftover.path.exists()


class TestLeftovers:
    @pytest.mark.parametrize("exists", [False, True])
    def test_those_of_dead_merges_are_removed(self, exists, config, out):
        (out if exists else out.parent).mkdir(parents=True)
        destination = Destination.of(out)
        leftover = destination.new_partial()
        leftover.mark.write_text(gethostname())
        leftover.path.mkdir()
        (leftover.path / "model-1.safetensors").touch()
        destination.lock.touch()
        merge(config, out)
        assert names(out) == WHOLE
        assert names(out.parent) == {"merged"}

    def test_those_of_other_hosts_are_named_and_kept(self, config, out, caplog):
        """Their locks may not be seen from here."""
        destination = Destination.of(out)
        leftover = destination.new_partial()
        leftover.path.mkdir(parents=True)
        leftover.mark.write_text("elsewhere")
        merge(config, out)
        assert leftover.path.is_dir()
        assert f"{leftover.path} belongs to a merge on host elsewhere" in caplog.text

    def test_nothing_else_is(self, config, out):
        others = {
            f"merged.metagpt-partial-{end}"
            for end in ("backup", "2024-1", "4194304", "9" * 30, "²", TOKEN)
        }
        elses = {f"else.metagpt-partial-{TOKEN}", f"else.metagpt-partial-{TOKEN}.unfinished"}
        for name in (*others, *elses):
            (out.parent / name).mkdir(parents=True)
        (out.parent / "merged.metagpt-partial-backup.unfinished").touch()
        before = names(out.parent)
        merge(config, out)
        assert names(out.parent) == before | {"merged"}

    def test_threads_that_still_write_leave_nothing(self, config, out, monkeypatch):
        def run_merge(_config, directory, *_):
            Path(directory).mkdir(exist_ok=True)
            (Path(directory) / "model-1.safetensors").touch()
            written.append(Path(directory) / "model-2.safetensors")
            raise RuntimeError("no such luck")

        def unlink(*args, **options):
            real(*args, **options)
            for file in written:  # as a thread does that has yet to write a shard
                if file.parent.exists():
                    file.touch()

        written: list[Path] = []
        real = os.unlink
        monkeypatch.setattr(whole, "run_merge", run_merge)
        monkeypatch.setattr(os, "unlink", unlink)
        merge(config, out, status=1)
        assert not names(out.parent)


STOPPED = """
import os, shutil, signal, sys
from pathlib import Path
from click.testing import CliRunner
from mergekit_metagpt.cli import main
from mergekit_metagpt.merging import whole

config, out = sys.argv[1], Path(sys.argv[2])
words = ["merge", config, str(out), "--quiet", "--no-copy-tokenizer"]
rmtree = shutil.rmtree

def stop(*_):
    os.kill(os.getpid(), number)
    raise AssertionError("still running")

def again(*args, **options):
    os.kill(os.getpid(), number)
    rmtree(*args, **options)

def merge():
    done = CliRunner().invoke(main, words)
    print(done.exit_code, done.stderr.strip(), len(list(out.parent.iterdir())))

shutil.rmtree = again
real, whole.SESSION.note = whole.SESSION.note, stop
# The tests may have been started with nohup, or in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    before = signal.getsignal(number)
    merge()
    assert signal.getsignal(number) == before
def hang_up(entries):
    os.kill(os.getpid(), signal.SIGHUP)
    real(entries)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
whole.SESSION.note = hang_up
merge()
"""


@on_posix
def test_a_signal_ends_it_in_one_sentence_and_a_second_one_leaves_nothing_either(config, out):
    out.parent.mkdir()
    done = run(sys.executable, "-c", STOPPED, config, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 Error: This command was stopped by SIGINT. 0",
        "1 Error: This command was stopped by SIGTERM. 0",
        "1 Error: This command was stopped by SIGHUP. 0",
        "0  1",  # one that was started with nohup
    ]
