"""A merge that has stopped goes on where it was, and ends with the bytes of one that has not."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import llama_config, merge_config, run, save_family, write_yaml
from test_cli_check import save_tokenizer
from test_merging_whole import files, merge, names

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.merging.shard import ShardMerge
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.planning.destination import Destination
from mergekit_metagpt.wording import reason

SHARDS = ("--out-shard-size", 30000)
RANDOM = {"granularity": "model", "density": 0.5}

KILLED = """
import os, secrets, signal, sys, time
from pathlib import Path
from click.testing import CliRunner
from mergekit_metagpt.cli import main
from mergekit_metagpt.merging import by_shard, journal, reservation, shard
from mergekit_metagpt.planning.destination import Partial

config, place = sys.argv[1], Path(sys.argv[2])
secrets.randbits = lambda bits: 7

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(module, name, number=1):
    # Let the process die in place of a call.
    real, calls = getattr(module, name), []
    def function(*args, **kwargs):
        calls.append(args)
        return die() if len(calls) == number else real(*args, **kwargs)
    setattr(module, name, function)

def third_file():
    def require_in_range(*args):
        calls.append(args)
        if len(calls) == 3:
            (mark,) = out.parent.glob("*.unfinished")
            while '"shard 2"' not in mark.read_text():
                time.sleep(0.01)
            die()
    calls, shard.require_in_range = [], require_in_range

def half_a_line():
    def note(self, name, value):
        if name != "shard 3":
            return real(self, name, value)
        with self.mark.open("a") as mark:
            mark.write('\\n{"shard 3": {"number": 3, "file": "mod')
        die()
    real, Partial.note = Partial.note, note

moments = {
    "before anything is complete": lambda: before(shard, "require_in_range"),
    "while the first file is noted": lambda: before(journal, "fingerprint"),
    "while the third file is noted": half_a_line,
    "while the third file is written": third_file,
    "when all files are complete": lambda: before(by_shard.TensorWriter, "finalize", 6),
    "when all files have their names": lambda: before(by_shard, "_write_model_files"),
    "before it is published": lambda: before(reservation.os, "rename", 7),
    "while it is moved": lambda: before(reservation.os, "rename", 9),
}
for moment, prepare in moments.items():
    out = place / moment.replace(" ", "-") / "merged"
    out.mkdir(parents=True) if "moved" in moment else out.parent.mkdir(parents=True)
    child = os.fork()
    if not child:
        prepare()
        words = ["merge", config, str(out), "--quiet", "--no-copy-tokenizer"]
        CliRunner().invoke(main, [*words, "--out-shard-size", "30000"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL, moment
"""


@pytest.fixture(scope="module")
def config(family, tmp_path_factory):
    yml = tmp_path_factory.mktemp("config") / "metagpt.yml"
    return write_yaml(yml, merge_config(family, "metagpt_dare_linear", parameters=RANDOM))


@pytest.fixture(scope="module")
def whole_merge(config, tmp_path_factory):
    """The files of a merge that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "merged"
    merge(config, out, *SHARDS, "--random-seed", 7)
    return files(out)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """A directory with an output for each moment at which a merge was killed."""
    place = tmp_path_factory.mktemp("killed")
    done = run(sys.executable, "-c", KILLED, config, place)
    assert done.returncode == 0, done.stderr
    return place


def merged_now(monkeypatch) -> list[int]:
    """Return a list that will hold the numbers of the files that are merged from now on."""
    numbers = []
    write = ShardMerge.write

    def counted(self, shard):
        numbers.append(shard.number)
        return write(self, shard)

    monkeypatch.setattr(ShardMerge, "write", counted)
    return numbers


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
class TestKilled:
    @pytest.mark.parametrize(
        ("moment", "complete"),
        [
            ("before-anything-is-complete", 0),
            ("while-the-first-file-is-noted", 0),
            ("while-the-third-file-is-noted", 2),
            ("while-the-third-file-is-written", 2),
            ("when-all-files-are-complete", 5),
            ("when-all-files-have-their-names", 5),
            ("before-it-is-published", 5),
            ("while-it-is-moved", 5),
        ],
    )
    def test_it_goes_on_and_ends_with_the_same_bytes(
        self, moment, complete, config, killed, whole_merge, monkeypatch
    ):
        out = killed / moment / "merged"
        numbers = merged_now(monkeypatch)
        merge(config, out, *SHARDS, "--resume")
        assert numbers == [1, 2, 3, 4, 5][complete:]
        assert files(out) == whole_merge
        assert names(out.parent) == {"merged"}


FULL = OSError("No space left")


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):
    """Return an output whose merge has stopped with two of its five files, and what it said."""

    def stop(error: BaseException = FULL, yml: Path = config):
        write = ShardMerge.write

        def until_the_third(self, shard):
            if shard.number == 3:
                raise error
            return write(self, shard)

        with monkeypatch.context() as patch:
            patch.setattr(ShardMerge, "write", until_the_third)
            patch.setattr("secrets.randbits", lambda bits: 7)
            done = merge(yml, tmp_path / "place" / "merged", *SHARDS, status=1)
        return tmp_path / "place" / "merged", done.stderr

    return stop


@pytest.mark.parametrize(
    "error",
    [FULL, KeyboardInterrupt("stopped by SIGTERM"), RuntimeError("no luck")],
)
def test_what_is_complete_is_kept_and_the_message_says_how_to_go_on(error, stopped):
    out, said = stopped(error)
    (partial,) = Destination.of(out).unfinished()
    assert said == (
        f"Error: The merge has not been finished ({reason(error)}), but 2 of its files are "
        f"complete and kept in {partial.path}; to go on, run the same command with --resume.\n"
    )
    assert {"model-1.safetensors", "model-2.safetensors"} == names(partial.path)


def test_without_resume_the_next_merge_removes_it(stopped, config, monkeypatch):
    out, _ = stopped()
    numbers = merged_now(monkeypatch)
    merge(config, out, *SHARDS)
    assert numbers == [1, 2, 3, 4, 5]
    assert names(out.parent) == {"merged"}


def test_a_file_that_lost_its_end_is_merged_again(stopped, config, whole_merge, monkeypatch):
    out, _ = stopped()
    (partial,) = Destination.of(out).unfinished()
    with (partial.path / "model-2.safetensors").open("r+b") as file:
        file.truncate(20000)
    numbers = merged_now(monkeypatch)
    merge(config, out, *SHARDS, "--resume")
    assert numbers == [2, 3, 4, 5]
    assert files(out) == whole_merge


def test_the_models_are_measured_once_more_or_not_at_all(stopped, config, monkeypatch):
    taken = []
    survey = Checkpoints.survey

    def counted(*args, **options):
        taken.append(args)
        return survey(*args, **options)

    monkeypatch.setattr(Checkpoints, "survey", counted)
    SESSION.surveys.clear()
    out, _ = stopped()
    assert len(taken) == 1
    SESSION.surveys.clear()
    merge(config, out, *SHARDS, "--resume")
    assert len(taken) == 2


CHANGES = {
    ("--random-seed", 8): "the seed has changed from 7 to 8",
    ("--num-threads", 2): "the list of options has changed from",
    ("--out-shard-size", 20000): "--out-shard-size 20000",
}


@pytest.mark.parametrize("words", CHANGES)
def test_other_options_are_refused_and_nothing_is_lost(words, stopped, config, whole_merge):
    out, _ = stopped()
    before = torch.get_num_threads()
    done = merge(config, out, *SHARDS, *words, "--resume", status=1)
    torch.set_num_threads(before)
    assert "cannot go on, because the " in done.stderr
    assert CHANGES[words] in done.stderr
    assert "or merge without --resume to begin anew." in done.stderr
    merge(config, out, *SHARDS, "--resume")
    assert files(out) == whole_merge


def test_so_is_another_config(stopped, config, tmp_path):
    out, _ = stopped()
    other = tmp_path / "other.yml"
    other.write_text(config.read_text().replace("0.5", "0.6"))
    done = merge(other, out, *SHARDS, "--resume", status=1)
    assert "cannot go on, because the config has changed; undo that" in done.stderr
    other.write_text(f"# a comment\n{config.read_text()}")
    merge(other, out, *SHARDS, "--resume")


def test_so_is_a_model_that_has_been_trained_on(stopped, tmp_path):
    paths = save_family(tmp_path, llama_config())
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    out, _ = stopped(FULL, yml)
    shutil.copy(f"{paths['a']}/model.safetensors", f"{paths['b']}/model.safetensors")
    done = merge(yml, out, *SHARDS, "--resume", status=1)
    changed = f"because weight file model.safetensors of {paths['b']} has changed; undo that"
    assert changed in done.stderr


def test_so_is_another_tokenizer(stopped, tmp_path):
    paths = save_family(tmp_path, llama_config())
    words = [f"w{number}" for number in range(63)]
    for path in paths.values():
        save_tokenizer(path, *words)
    config = merge_config(paths, tokenizer={"source": "base"})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    out, _ = stopped(FULL, yml)
    save_tokenizer(paths["a"], *reversed(words))
    done = merge(yml, out, *SHARDS, "--resume", status=1)
    assert "because the tokenizer has changed; undo that" in done.stderr


def test_a_merge_that_is_refused_leaves_nothing(stopped):
    out, said = stopped(ValueError("holds NaN"))
    assert "holds NaN" in said
    assert not names(out.parent)


def test_with_nothing_to_resume_it_begins_and_a_finished_merge_is_refused(config, tmp_path):
    out = tmp_path / "merged"
    said = merge(config, out, *SHARDS, "--resume").stderr
    assert f"No unfinished merge into {out} can go on, so this one begins anew." in said
    assert "holds an older merge" in merge(config, out, *SHARDS, "--resume", status=1).stderr


def test_files_that_were_moved_when_it_was_killed_are_removed_too(stopped, config, tmp_path):
    out = tmp_path / "place" / "merged"
    out.mkdir(parents=True)
    stopped()
    (partial,) = Destination.of(out).unfinished()
    partial.note("moved", ["model-1.safetensors", "model-2.safetensors"])
    (partial.path / "model-1.safetensors").rename(out / "model-1.safetensors")
    merge(config, out, *SHARDS)
    assert "model-1.safetensors" not in names(out)
