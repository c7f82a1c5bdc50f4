"""Where a merge is written, and what is kept of one whose last steps fail."""

import errno
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import reference
import transformers
from conftest import invoke, llama_config, merge_config, put_nan, read, save_family, write_yaml
from mergekit.tokenizer import BuildTokenizer
from test_cli_check import save_tokenizer

from mergekit_metagpt.merging import by_shard, whole

WEIGHTS = {"model.safetensors", "config.json", "mergekit_config.yml", "metagpt.json"}
WHOLE = WEIGHTS | {"README.md", "coefficients.png"}


def merge(*words, status: int = 0):
    return invoke("merge", *words, "--quiet", "--no-copy-tokenizer", status=status)


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


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "merged"


@pytest.fixture
def existing(out):
    """An output that exists, such as the volume of a container, which cannot be replaced."""
    out.mkdir(parents=True)
    return out


@pytest.fixture
def rename_fails(monkeypatch):
    """Let the rename to a path fail, as onto a mount point or from another disk."""

    def fail(path: Path, number: int) -> None:
        def rename(source, target):
            if Path(target) == path:
                raise OSError(number, os.strerror(number))
            real(source, target)

        real = os.rename
        monkeypatch.setattr(os, "rename", rename)

    return fail


class TestADirectoryThatExists:
    def test_it_is_filled_and_stays_itself_as_does_a_link_to_it(
        self, config, family, existing, tmp_path, rename_fails
    ):
        link, before = tmp_path / "link", existing.stat().st_ino
        link.symlink_to(existing)
        rename_fails(existing, errno.EBUSY)
        merge(config, link)
        assert link.is_symlink()
        assert existing.stat().st_ino == before
        assert names(existing.parent) == {"merged"}
        assert names(existing) == WHOLE
        assert_merge_of(existing, family)
        assert "# link" in (existing / "README.md").read_text()

    def test_nothing_can_load_it_before_it_is_complete(self, config, existing, monkeypatch):
        order = []
        real = os.rename

        def rename(source, target):
            if Path(target).parent == existing and Path(target).suffix != ".removed":
                order.append(Path(target).name)
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
        merge(config, existing, "--out-shard-size", "30000")
        assert set(order) >= names(existing)
        assert order[-2:] == ["model.safetensors.index.json", "config.json"]

    def test_a_move_that_fails_is_undone(self, config, family, existing, rename_fails, caplog):
        rename_fails(existing / "config.json", errno.EIO)
        merge(config, existing, status=1)
        (kept,) = existing.iterdir()
        assert str(kept) in caplog.text
        assert names(kept / "merged") == WHOLE
        assert_merge_of(kept / "merged", family)

    def test_what_others_put_there_meanwhile_is_not_written_over(
        self, config, existing, monkeypatch
    ):
        real = whole.merge_record

        def note(*args):
            (existing / "README.md").write_text("mine")
            return real(*args)

        monkeypatch.setattr(whole, "merge_record", note)
        assert "no longer empty" in merge(config, existing, status=1).stderr
        assert (existing / "README.md").read_text() == "mine"

    def test_it_is_empty_again_after_a_failure(self, existing, tmp_path):
        paths = save_family(tmp_path, llama_config())
        put_nan(paths["a"], "model.norm.weight")
        config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
        assert "holds NaN or Inf" in merge(config, existing, status=1).stderr
        assert not names(existing)


class TestACompleteMerge:
    """Once the weights are there, no failure of a later step removes them."""

    def test_it_is_kept_where_it_cannot_be_renamed_and_then_only_published(
        self, config, family, out, rename_fails, caplog, monkeypatch
    ):
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

    @pytest.mark.parametrize(
        ("module", "step", "error"),
        [
            (whole, "merge_record", RuntimeError("no such luck")),
            (by_shard, "copy_tagalong_files", KeyboardInterrupt()),
        ],
    )
    def test_it_is_kept_if_a_step_after_it_fails_or_is_stopped(
        self, module, step, error, config, family, out, monkeypatch
    ):
        monkeypatch.setattr(module, step, failing(error))
        assert str(error) in merge(config, out, status=1).stderr
        (kept,) = out.parent.iterdir()
        assert_merge_of(kept / "merged", family)


class TestTheCard:
    def test_the_hub_is_not_asked_for_it(self, family, out, tmp_path, monkeypatch):
        """Also where relative paths with one slash might be names on the hub."""
        paths = {name: f"models/{name}" for name in family}
        for name, path in family.items():
            shutil.copytree(path, tmp_path / paths[name])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "repo_exists", None)
        merge(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)), out)
        assert names(out) == WHOLE
        card = huggingface_hub.ModelCard.load(out / "README.md")
        assert card.data.base_model is None
        assert "\n* models/a\n" in card.text

    @pytest.mark.parametrize(
        ("step", "file", "warning"),
        [
            ("merging.whole.write_card", "README.md", "The model card could not be written"),
            ("api.calls.comparison_figure", "coefficients.png", "coefficients.png could not be"),
        ],
    )
    def test_one_that_cannot_be_made_costs_a_warning_as_does_its_picture(
        self, step, file, warning, config, family, out, monkeypatch, caplog
    ):
        monkeypatch.setattr(f"mergekit_metagpt.{step}", failing(OSError("the disk hiccups")))
        merge(config, out)
        assert warning in caplog.text
        assert "(the disk hiccups)" in caplog.text
        assert names(out) == WHOLE - {file}
        assert_merge_of(out, family)
        card = out / "README.md"
        assert not card.exists() or "coefficients.png" not in card.read_text()

    def test_without_one_there_is_no_config_either(self, config, out):
        merge(config, out, "--no-write-model-card")
        assert names(out) == WEIGHTS - {"mergekit_config.yml"}


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


def test_tokens_that_mergekit_orders_anew_are_another_merge(tmp_path, out, monkeypatch):
    """Its union of tokenizers may have another order in each process."""
    paths = save_family(tmp_path, llama_config())
    words = [f"w{number}" for number in range(64)]
    for path in paths.values():
        save_tokenizer(path, *words)
    raw = merge_config(paths, tokenizer={"source": "union"})
    config = write_yaml(tmp_path / "metagpt.yml", raw)
    with monkeypatch.context() as patch:
        patch.setattr(whole, "merge_record", failing(OSError("No space left")))
        merge(config, out, status=1)
    (kept,) = names(out.parent)
    build = BuildTokenizer.execute

    def in_another_order(self):
        save_tokenizer(str(tmp_path / "other"), *reversed(words))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "other")
        rows = {number: 63 - number for number in range(64)}
        built = build(self)
        permutations = dict.fromkeys(built.permutations, rows)
        return built.model_copy(update={"tokenizer": tokenizer, "permutations": permutations})

    monkeypatch.setattr(BuildTokenizer, "execute", in_another_order)
    merge(config, out)
    assert names(out.parent) == {"merged", kept}
