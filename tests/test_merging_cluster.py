"""Merges on a Ray cluster: the bytes of a local merge, whatever becomes of the workers."""

import dataclasses
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from conftest import (
    edit,
    files,
    invoke,
    llama_config,
    merge_config,
    put_nan,
    save_adapter,
    save_family,
    save_tokenizer,
    write_yaml,
)
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer

from mergekit_metagpt.api import functions
from mergekit_metagpt.merging import by_shard
from mergekit_metagpt.planning.directory import Output, Work
from mergekit_metagpt.workers import RayMapper, in_this_process

pytest.importorskip("ray")

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("cluster")]

SHARDS = ("--out-shard-size", "30000")


def merge(config: dict, out: Path, *words, status: int = 0):
    out.parent.mkdir(exist_ok=True)
    yml = write_yaml(out.parent / "metagpt.yml", config)
    return invoke("merge", yml, out, "--quiet", *words, status=status)


@pytest.fixture
def same_bytes(tmp_path):
    """Merge here and on the cluster, compare all files, and return their names."""

    def compare(config: dict, *words) -> set[str]:
        outs = [tmp_path / "here" / "merged", tmp_path / "cluster" / "merged"]
        words = (*words, "--random-seed", 5)
        merge(config, outs[1], *words, "--ray")
        merge(config, outs[0], *words)
        assert {path.name for path in outs[1].parent.iterdir()} == {"merged", "metagpt.yml"}
        here, cluster = map(files, outs)
        assert cluster.keys() == here.keys()
        assert [name for name in here if cluster[name] != here[name]] == []
        return set(here)

    return compare


@pytest.fixture
def mapper(monkeypatch):
    """Let ``--ray`` hand out tasks in another way: ``change(function)`` in place of a function."""

    def use(change, patch=monkeypatch):
        class Changed(RayMapper):
            def __call__(self, function, items, **options):
                return super().__call__(change(function), items, **options)

        patch.setattr(functions, "RayMapper", Changed)

    return use


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("metagpt", {"granularity": "direction"}),
        ("metagpt_ties", {"granularity": "layer", "density": 0.5}),
    ],
)
def test_every_file_is_that_of_a_local_merge(method, parameters, family, same_bytes, tmp_path):
    """The adapter is applied once for all workers."""
    adapter = save_adapter(family["base"], tmp_path / "lora")
    models = {**family, "lora": f"{family['base']}+{adapter}"}
    words = (*SHARDS, "--lora-merge-cache", tmp_path / "cache")
    found = same_bytes(merge_config(models, method, parameters=parameters), *words)
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    assert "model.safetensors.index.json" in found


def test_tied_vocabularies_and_tokenizers_are_those_of_a_local_merge(same_bytes, tmp_path):
    model = llama_config(tie_word_embeddings=True)
    paths = save_family(tmp_path / "tied", model, max_shard_size="60KB")
    for name, path in paths.items():
        words = [f"w{number}" for number in range(63)]
        save_tokenizer(path, *words, *(["new"] if name == "b" else []))
    tokenizer = {"source": "union", "pad_to_multiple_of": 6}
    config = merge_config(paths, tokenizer=tokenizer, dtype="float32", out_dtype="bfloat16")
    found = same_bytes(config, *SHARDS)
    assert {"tokenizer.json", "model.safetensors.index.json"} <= found


def test_a_worker_that_is_killed_is_replaced_and_changes_nothing(
    family, same_bytes, mapper, tmp_path
):
    died = tmp_path / "died"

    def dying(write):
        def written(shard):
            if "-00002" in shard.file and not died.exists():
                by_shard.require_in_range = die  # what follows the writing of the file
            return write(shard)

        def die(unfinished, out_dtype):
            died.write_text(" ".join(os.listdir(unfinished)))
            os._exit(1)

        return written

    mapper(dying)
    same_bytes(merge_config(family, "metagpt_dare_linear"), *SHARDS)
    assert died.read_text() == "model.safetensors"


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_failure_is_the_sentence_of_here_and_leaves_nothing_behind(granularity, own, tmp_path):
    put_nan(own["a"], "model.layers.1.mlp.up_proj.weight")
    config = merge_config(own, parameters={"granularity": granularity})
    here = merge(config, tmp_path / "merged", *SHARDS, status=1).stderr
    before = set(tmp_path.iterdir())
    assert "up_proj.weight of model" in here
    assert merge(config, tmp_path / "merged", *SHARDS, "--ray", status=1).stderr == here
    assert set(tmp_path.iterdir()) == before


def test_the_work_that_all_tasks_share_is_done_once(own, tmp_path, monkeypatch, passes):
    """Also where the config narrows the models, and one of two tied tensors is not surveyed."""
    planned, built = [], []
    plan, build = MergePlanner.plan_to_disk, BuildTokenizer.execute
    monkeypatch.setattr(
        MergePlanner, "plan_to_disk", lambda self, path: planned.append(path) or plan(self, path)
    )
    monkeypatch.setattr(
        BuildTokenizer, "execute", lambda self, **_: built.append(self) or build(self)
    )
    monkeypatch.setattr(functions, "RayMapper", lambda *_: in_this_process)
    for path in own.values():
        save_tokenizer(path, *(f"w{number}" for number in range(64)))
        edit(path, lambda it: it["lm_head.weight"].copy_(it["model.embed_tokens.weight"]))
    config = merge_config(
        own, parameters={"granularity": "model"}, dtype="bfloat16", tokenizer={"source": "base"}
    )
    merge(config, tmp_path / "merged", *SHARDS, "--ray")
    assert (len(planned), len(built), len(passes)) == (1, 1, 1)


def test_a_merge_that_has_stopped_goes_on_here_or_there(family, mapper, tmp_path):
    def full(write):
        def written(shard):
            file = getattr(shard, "file", "")  # surveys are tasks, too
            if "-00003" in file:
                raise OSError("No space left")
            if "-00004" in file:
                time.sleep(1)
            return write(shard)

        return written

    config = merge_config(family, parameters={"granularity": "model"})
    outs = [tmp_path / where / "merged" for where in ("whole", "here", "there")]
    with pytest.MonkeyPatch.context() as patch:
        mapper(full, patch)
        assert "No space left" in merge(config, outs[1], *SHARDS, "--ray", status=1).stderr
    shutil.copytree(outs[1].parent, outs[2].parent)
    (work,) = Output.of(outs[2]).works()
    assert {f"model-0000{n}-of-00005.safetensors" for n in (1, 2)} <= set(work.records)
    merge(config, outs[0], *SHARDS)
    merge(config, outs[1], *SHARDS)
    merge(config, outs[2], *SHARDS, "--ray")
    whole, here, there = map(files, outs)
    assert whole == here == there


def test_a_machine_that_does_not_share_the_output_directory_is_named(family, mapper, tmp_path):
    def elsewhere(write):
        moved = dataclasses.replace(write.__self__, work=Work(tmp_path / "elsewhere"))
        return moved.write

    mapper(elsewhere)
    done = merge(merge_config(family), tmp_path / "merged", "--ray", status=1)
    assert f"{socket.gethostname()} of the cluster does not see {tmp_path}/elsewhere" in done.stderr
    assert not list(tmp_path.glob("merged*"))


def test_stock_methods_are_refused_with_the_way_out(family, tmp_path):
    config = merge_config(family, "dare_ties", parameters={"weight": 0.5, "density": 0.5})
    done = merge(config, tmp_path / "merged", "--ray", status=1)
    assert "choose metagpt or a metagpt_X in place of dare_ties" in done.stderr
    assert not list(tmp_path.glob("merged*"))
