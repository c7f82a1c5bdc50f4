"""Where a merge is written, and what is kept of one whose last steps fail."""

import errno
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import reference
import torch
from click.testing import CliRunner
from conftest import llama_config, merge_config, put_nan, read, save_family, write_yaml

from mergekit_metagpt.cli import main
from mergekit_metagpt.merging import by_shard, whole

WEIGHTS = {"model.safetensors", "config.json", "mergekit_config.yml", "metagpt.json"}
WHOLE = WEIGHTS | {"README.md", "coefficients.png"}
TOKEN = "0123456789abcdef"


def merge(*words, status: int = 0):
    words = ["merge", *map(str, words), "--quiet", "--no-copy-tokenizer"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == status, done.output
    return done


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def files(out: Path) -> dict[str, bytes]:
    """Return the contents of all files, but for the times in the record."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    record = json.loads(found["metagpt.json"])
    assert record.pop("times").keys() == {"started", "finished"}
    return {**found, "metagpt.json": json.dumps(record).encode()}


def assert_merge_of(out: Path, family: dict[str, str]) -> None:
    base, *experts = map(read, family.values())
    expected = reference.coefficients(base, experts, "tensor")
    reference.assert_merged(read(out), base, experts, expected)


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "merged"


@pytest.fixture
def rename_fails(monkeypatch):
    """Let the rename to a path fail, as onto a mount point or from another disk."""

    def fail(path: Path, number: int = errno.EBUSY) -> None:
        def rename(source, target):
            if Path(target) == path:
                raise OSError(number, os.strerror(number))
            real(source, target)

        real = os.rename
        monkeypatch.setattr(os, "rename", rename)

    return fail


class TestADirectoryThatExists:
    """Such as the volume of a container, which cannot be replaced."""

    def test_it_is_filled_and_stays_itself(self, config, family, out, rename_fails):
        out.mkdir(parents=True)
        before = out.stat().st_ino
        rename_fails(out)
        merge(config, out)
        assert out.stat().st_ino == before
        assert names(out.parent) == {"merged"}
        assert names(out) == WHOLE
        assert_merge_of(out, family)
        assert "# merged" in (out / "README.md").read_text()

    def test_a_link_to_it_stays_one(self, config, family, out, tmp_path):
        out.mkdir(parents=True)
        link = tmp_path / "link"
        link.symlink_to(out)
        merge(config, link)
        assert link.is_symlink()
        assert names(out) == WHOLE
        assert "# link" in (out / "README.md").read_text()

    def test_nothing_can_load_it_before_it_is_complete(self, config, out, monkeypatch):
        out.mkdir(parents=True)
        order = []
        real = os.rename

        def rename(source, target):
            if Path(target).parent == out and Path(target).suffix != ".removed":
                order.append(Path(target).name)
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
        merge(config, out, "--out-shard-size", "30000")
        assert set(order) >= names(out)
        assert order[-2:] == ["model.safetensors.index.json", "config.json"]

    def test_a_move_that_fails_is_undone(self, config, family, out, rename_fails, caplog):
        out.mkdir(parents=True)
        rename_fails(out / "config.json", errno.EIO)
        merge(config, out, status=1)
        (kept,) = out.iterdir()
        assert str(kept) in caplog.text
        assert names(kept / "merged") == WHOLE
        assert_merge_of(kept / "merged", family)

    def test_what_others_put_there_meanwhile_is_not_written_over(self, config, out, monkeypatch):
        out.mkdir(parents=True)
        real = whole.merge_record

        def note(*args):
            (out / "README.md").write_text("mine")
            return real(*args)

        monkeypatch.setattr(whole, "merge_record", note)
        assert "no longer empty" in merge(config, out, status=1).stderr
        assert (out / "README.md").read_text() == "mine"

    def test_it_is_empty_again_after_a_failure(self, out, tmp_path):
        paths = save_family(tmp_path, llama_config())
        put_nan(paths["a"], "model.norm.weight")
        out.mkdir(parents=True)
        merge(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)), out, status=1)
        assert not names(out)


class TestACompleteMerge:
    """Once the weights are there, no failure of a later step removes them."""

    def test_it_is_kept_where_it_cannot_be_renamed_and_then_only_published(
        self, config, family, out, rename_fails, caplog, monkeypatch
    ):
        with monkeypatch.context():
            rename_fails(out, errno.EXDEV)
            done = merge(config, out, status=1)
        (kept,) = out.parent.iterdir()
        assert f"kept in {kept}; run the same command again" in caplog.text
        assert "Invalid cross-device link" in done.stderr
        assert done.stderr.count("\n") == 1
        assert names(kept / "merged") == WHOLE
        assert_merge_of(kept / "merged", family)
        monkeypatch.undo()
        monkeypatch.setattr("mergekit_metagpt.merging.shard.ShardMerge.write", None)
        merge(config, out)
        assert names(out.parent) == {"merged"}
        assert_merge_of(out, family)

    @pytest.mark.parametrize("error", [RuntimeError("no such luck"), KeyboardInterrupt()])
    @pytest.mark.parametrize(
        ("module", "step"), [(whole, "merge_record"), (by_shard, "copy_tagalong_files")]
    )
    def test_it_is_kept_if_a_step_after_it_fails_or_is_stopped(
        self, module, step, error, config, family, out, monkeypatch
    ):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(module, step, fail)
        assert str(error) in merge(config, out, status=1).stderr
        (kept,) = out.parent.iterdir()
        assert_merge_of(kept / "merged", family)


class TestTheCard:
    @pytest.fixture
    def here(self, family, tmp_path, monkeypatch):
        """A config of relative paths with one slash, which might be names on the hub."""
        paths = {name: f"models/{name}" for name in family}
        for name, path in family.items():
            shutil.copytree(path, tmp_path / paths[name])
        monkeypatch.chdir(tmp_path)
        return write_yaml(tmp_path / "metagpt.yml", merge_config(paths))

    def test_the_hub_is_not_asked_for_it(self, here, family, out, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        merge(here, out)
        assert names(out) == WHOLE
        assert_merge_of(out, family)
        card = huggingface_hub.ModelCard.load(out / "README.md")
        assert card.data.base_model is None
        assert "\n* models/a\n" in card.text

    def test_one_that_cannot_be_made_costs_a_warning(self, here, family, out, monkeypatch, caplog):
        def fail(*_, **__):
            raise OSError("the disk hiccups")

        monkeypatch.setattr(whole, "write_card", fail)
        merge(here, out)
        assert "model card could not be written (the disk hiccups)" in caplog.text
        assert names(out) == WHOLE - {"README.md"}
        assert_merge_of(out, family)

    def test_so_does_a_picture(self, config, out, monkeypatch, caplog):
        def fail(*_, **__):
            raise RuntimeError("no font is here")

        monkeypatch.setattr("mergekit_metagpt.api.calls.comparison_figure", fail)
        merge(config, out)
        assert "coefficients.png could not be drawn (no font is here)" in caplog.text
        assert names(out) == WHOLE - {"coefficients.png"}
        assert "coefficients.png" not in (out / "README.md").read_text()

    def test_without_one_there_is_no_config_either(self, config, out):
        merge(config, out, "--no-write-model-card")
        assert names(out) == WEIGHTS - {"mergekit_config.yml"}


def test_a_seed_follows_from_the_merge_and_repeats_it(family, out, tmp_path):
    config = merge_config(family, "metagpt_dare_linear", parameters={"density": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    merge(yml, out)
    seed = json.loads((out / "metagpt.json").read_text())["seed"]
    assert f"--random-seed {seed}" in (out / "README.md").read_text()
    merge(yml, tmp_path / "other", "--random-seed", seed - 1)
    merge(yml, tmp_path / "again", "--random-seed", seed)
    first, other, again = map(read, (out, tmp_path / "other", tmp_path / "again"))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert not all(torch.equal(other[name], first[name]) for name in first)


def test_a_weight_file_that_changes_while_it_is_merged_is_named_and_nothing_stays(
    tmp_path, out, monkeypatch
):
    """Also where the merge could not see it, after the last tensor was read."""
    paths = save_family(tmp_path, llama_config())
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    merge_by_shard = whole.merge_by_shard

    def then_replace(*args):
        merge_by_shard(*args)
        file = Path(paths["b"], "model.safetensors")
        shutil.copy(file, tmp_path / "copy")
        os.replace(tmp_path / "copy", file)

    monkeypatch.setattr(whole, "merge_by_shard", then_replace)
    done = merge(config, out, status=1)
    assert f"Weight file {paths['b']}/model.safetensors has changed since this merge" in done.stderr
    assert not names(out.parent)
    monkeypatch.setattr(whole, "merge_by_shard", merge_by_shard)
    merge(config, out)
    assert names(out) == WHOLE
