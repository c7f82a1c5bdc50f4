"""Where a merge is written, what is kept of one whose last steps fail, and its record."""

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    WHOLE,
    assert_merge_of,
    files,
    merge_config,
    names,
    save_tokenizer,
    write_yaml,
)
from conftest import invoke_merge as merge
from mergekit.tokenizer import BuildTokenizer

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.merging import by_shard, whole


def failing(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


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
    """Let the rename to a path fail, as onto a mount point; list the targets of others."""

    def fail(path: Path, number: int) -> list[Path]:
        def rename(source, target):
            if Path(target) == path:
                raise OSError(number, os.strerror(number))
            real(source, target)
            renamed.append(Path(target))

        real, renamed = os.rename, []
        monkeypatch.setattr(os, "rename", rename)
        return renamed

    return fail


class TestADirectoryThatExists:
    def test_it_is_filled_and_stays_itself_as_does_a_link_to_it(
        self, config, family, existing, tmp_path, rename_fails
    ):
        """Nothing can load it before it is complete."""
        link, before = tmp_path / "link", existing.stat().st_ino
        link.symlink_to(existing)
        renamed = rename_fails(existing, errno.EBUSY)
        merge(config, link, "--out-shard-size", "30000")
        assert link.is_symlink()
        assert existing.stat().st_ino == before
        assert names(existing.parent) == {"merged"}
        assert names(existing) > WHOLE - {"model.safetensors"}
        moved = [path.name for path in renamed if path.parent == existing]
        assert set(moved) == names(existing)
        assert moved[-2:] == ["model.safetensors.index.json", "config.json"]
        assert_merge_of(existing, family)
        assert "# link" in (existing / "README.md").read_text()

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


@pytest.mark.parametrize("exists", [False, True])
def test_it_is_kept_where_it_cannot_be_moved_and_then_only_published(
    exists, config, family, out, rename_fails, caplog, monkeypatch
):
    place = out if exists else out.parent
    place.mkdir(parents=True)
    rename_fails(out / "config.json" if exists else out, errno.EXDEV)
    done = merge(config, out, status=1)
    (kept,) = place.iterdir()
    assert f"kept in {kept}; run the same command again" in caplog.text
    assert "Invalid cross-device link" in done.stderr
    assert done.stderr.count("\n") == 1
    assert names(kept / "merged") == WHOLE
    assert_merge_of(kept / "merged", family)
    monkeypatch.undo()
    monkeypatch.setattr("mergekit_metagpt.merging.by_shard.ShardMerge.write", None)
    merge(config, out)
    assert names(out.parent) == {"merged"}
    assert_merge_of(out, family)


@pytest.mark.parametrize(
    ("module", "step", "error"),
    [
        (whole, "merge_record", RuntimeError("no such luck")),
        (mergekit_private, "copy_tagalong_files", KeyboardInterrupt()),
    ],
)
def test_weights_are_kept_if_a_step_after_them_fails_or_is_stopped(
    module, step, error, config, family, out, monkeypatch
):
    monkeypatch.setattr(module, step, failing(error))
    assert str(error) in merge(config, out, status=1).stderr
    (kept,) = out.parent.iterdir()
    assert_merge_of(kept / "merged", family)


@pytest.mark.parametrize(
    ("step", "file", "warning"),
    [
        ("merging.whole.write_card", "README.md", "The model card could not be written"),
        ("api.functions.comparison_figure", "coefficients.png", "coefficients.png could not be"),
    ],
)
def test_a_card_that_cannot_be_made_costs_a_warning_as_does_its_picture(
    step, file, warning, config, family, out, monkeypatch, caplog
):
    monkeypatch.setattr(f"mergekit_metagpt.{step}", failing(OSError("the disk hiccups")))
    merge(config, out)
    assert warning in caplog.text
    assert "(the disk hiccups)" in caplog.text
    assert names(out) == WHOLE - {file}
    assert_merge_of(out, family)
    card = out / "README.md"
    assert not card.exists() or "coefficients.png" not in card.read_text()


def test_a_weight_file_that_changes_while_it_is_merged_is_named_and_nothing_stays(
    own, tmp_path, out, monkeypatch
):
    """Also where the merge could not see it, after the last tensor was read."""
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(own))
    merge_by_shard = by_shard.merge_by_shard

    def then_replace(*args):
        merge_by_shard(*args)
        file = Path(own["b"], "model.safetensors")
        shutil.copy(file, tmp_path / "copy")
        os.replace(tmp_path / "copy", file)

    monkeypatch.setattr(by_shard, "merge_by_shard", then_replace)
    done = merge(config, out, status=1)
    assert f"Weight file {own['b']}/model.safetensors has changed since this merge" in done.stderr
    assert not names(out.parent)


def test_tokens_that_mergekit_orders_anew_are_another_merge(own, tmp_path, out, monkeypatch):
    """Its union of tokenizers may have another order in each process."""
    words = [f"w{number}" for number in range(64)]
    for path in own.values():
        save_tokenizer(path, *words)
    raw = merge_config(own, tokenizer={"source": "union"})
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


def test_pickled_files_in_float16_are_read_back_and_without_a_card_there_is_no_config(
    family, out, tmp_path
):
    config = write_yaml(tmp_path / "m.yml", merge_config(family, out_dtype="float16"))
    merge(config, out, "--no-safe-serialization", "--no-write-model-card")
    assert names(out) == {"pytorch_model.bin", "config.json", "metagpt.json"}
    tensors = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


# The record, and the command that repeats a merge


def record_of(out: Path):
    return json.loads((out / "metagpt.json").read_text())


def repeated(out: Path) -> list[str]:
    """Return the options of the card's command that repeats the merge."""
    text = (out / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("mergekit-yaml ")]
    return shlex.split(line)[3:]


def test_the_record_says_what_was_merged_and_with_what(config, family, out):
    merge(config, out, "--random-seed", 5)
    assert_merge_of(out, family)
    record = record_of(out)
    assert record["config"] == config.read_text()
    assert record["granularity"] == ["tensor"]
    assert record["seed"] == 5
    assert {model["model"] for model in record["inputs"]} == set(family.values())
    (file,) = record["inputs"][0]["files"]
    path = Path(record["inputs"][0]["model"], file["name"])
    assert (file["bytes"], file["sha256"]) == (path.stat().st_size, sha256_of(path))
    assert {"mergekit", "torch", "transformers", "mergekit-metagpt"} <= record["versions"].keys()
    # A plain merge does not depend on threads.
    assert repeated(out) == ["--random-seed", "5", "--no-copy-tokenizer"]


def test_the_cards_command_repeats_the_merge_to_the_byte(family, tmp_path):
    config = merge_config(family, "metagpt_dare_ties", parameters={"density": 0.5})
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    merge(write_yaml(tmp_path / "metagpt.yml", config), one, "--out-shard-size", "20K")
    words = repeated(one)
    seed = record_of(one)["seed"]  # follows from the merge
    assert words == [
        "--random-seed", str(seed), "--out-shard-size", "20000", "--no-copy-tokenizer",
        "--num-threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    assert record_of(one)["options"] == words[2:]
    merge(one / "mergekit_config.yml", two, *words[:4])
    merge(one / "mergekit_config.yml", other, "--random-seed", seed - 1, *words[2:4])
    weights = [
        {name: data for name, data in files(out).items() if name.endswith(".safetensors")}
        for out in (one, two, other)
    ]
    assert len(weights[0]) > 1
    assert weights[0] == weights[1] != weights[2]
