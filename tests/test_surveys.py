"""``mergekit-metagpt survey``, and the cache that lets no command measure the same models twice."""

import errno
import json
import os
import shutil
from pathlib import Path

import platformdirs
import pytest
import torch
from conftest import (
    checkpoints,
    edit,
    invoke,
    llama_config,
    merge_config,
    on_posix,
    save_adapter,
    save_family,
    save_tokenizer,
    slices_config,
    write_yaml,
)
from safetensors.torch import load_file, save

import mergekit_metagpt


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("three"), llama_config(), scales=(0.01, 0.03, 0.02))


def cached() -> list[Path]:
    return sorted(platformdirs.user_cache_path("mergekit-metagpt").rglob("*.json"))


def test_the_command_shows_what_was_measured(three):
    base, *experts = three.values()
    shown = json.loads(invoke("survey", *three.values(), "--json").stdout)
    exact = checkpoints(three).survey(progress=False, products=True)
    assert (shown["base"], shown["experts"]) == (base, experts)
    assert tuple(shown["squared_norms"]) == exact.model
    assert shown["cosines"] == exact.cosines
    assert shown["coefficients"] == mergekit_metagpt.scaling_coefficients(exact.model)
    table = invoke("survey", *three.values()).stdout
    assert all(f"{round(value, 2) + 0.0:.2f}" in table for row in exact.cosines for value in row)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_after_a_survey_nothing_is_measured_and_nothing_changes(
    granularity, three, tmp_path, passes, monkeypatch
):
    # An expert fewer, and in another order.
    some = {name: three[name] for name in ("base", "c", "a")}
    config = merge_config(some, parameters={"granularity": granularity})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    invoke("survey", *three.values())
    shown = [
        invoke(name, yml, *more).stdout
        for name, *more in (("coefficients", "--json"), ("resolve",))
    ]
    invoke("merge", yml, tmp_path / "quick", "--no-copy-tokenizer")
    assert len(passes) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert [invoke("coefficients", yml, "--json").stdout, invoke("resolve", yml).stdout] == shown
    invoke("merge", yml, tmp_path / "plain", "--no-copy-tokenizer")
    assert len(passes) == 2
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "quick")]
    assert weights[0] == weights[1]


def test_a_stock_merge_shares_it_with_the_commands(family, tmp_path, merge, passes):
    config = merge_config(family, parameters={"granularity": "model"})
    first = merge(config)
    invoke("coefficients", write_yaml(tmp_path / "metagpt.yml", config))  # with inner products
    second = merge(config)
    assert len(passes) == 2
    assert len(set(passes)) == 1
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_slices_of_fewer_experts_take_their_part(three, tmp_path, passes):
    config = slices_config(three, [[0, 2]], parameters={"granularity": "model"})
    few = slices_config({k: three[k] for k in ("base", "a", "b")}, [[2, 3]])
    config["slices"] += few["slices"]
    invoke("coefficients", write_yaml(tmp_path / "metagpt.yml", config))
    assert len(passes) == 1


def test_a_model_with_another_tokenizer_is_measured_again(own, passes):
    config = merge_config(own, parameters={"granularity": "model"})
    words = [f"w{n}" for n in range(60)]
    for count, tokens in enumerate((words, words[::-1]), 1):  # in the same files
        save_tokenizer(own["b"], *tokens)
        mergekit_metagpt.plan(config)
        assert len(passes) == count


@on_posix
def test_a_file_written_over_by_a_copy_with_the_same_time_is_measured_again(own, passes):
    """As archives that have one time for all files, unpacked in place, leave it."""
    config = merge_config(own, parameters={"granularity": "model"})
    mergekit_metagpt.plan(config)
    file = Path(own["b"], "model.safetensors")
    before, tensors = file.stat(), load_file(file)
    file.write_bytes(save({n: 2 * t for n, t in tensors.items()}, metadata={"format": "pt"}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    mergekit_metagpt.plan(config)
    assert len(passes) == 2


def test_a_file_that_an_index_finds_in_a_folder_below_counts(own, passes):
    """And is changed in place, so that only its time tells."""
    model = Path(own["b"], "model.safetensors")
    tensors, moved = load_file(model), Path(own["b"], "w", model.name)
    index = {"weight_map": dict.fromkeys(tensors, f"w/{model.name}")}
    model.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    model.unlink()
    moved.parent.mkdir()
    for factor in (1, 3):
        tensors["model.norm.weight"] *= factor
        moved.write_bytes(save(tensors, metadata={"format": "pt"}))
        mergekit_metagpt.plan(merge_config(own, parameters={"granularity": "model"}))
    assert len(passes) == 2


def test_experts_that_a_survey_says_too_little_of_are_measured(own, tmp_path, passes, caplog):
    """Without an expert of another vocabulary, vocabularies agree."""
    third, words = str(shutil.copytree(own["a"], tmp_path / "c")), [f"w{n}" for n in range(60)]
    for path in own.values():
        save_tokenizer(path, *words)
    save_tokenizer(third, *reversed(words))
    assert json.loads(invoke("survey", *own.values(), third, "--json").stdout)["left_out"]
    assert not json.loads(invoke("survey", *own.values(), "--json").stdout)["left_out"]
    assert len(passes) == 2
    caplog.clear()
    invoke("survey", *own.values(), third)  # from the cache
    assert len(passes) == 2
    assert "the rows of lm_head.weight different meanings; the tensor does not" in caplog.text


@pytest.mark.parametrize("is_frozen", [False, True])
def test_tensors_that_only_some_experts_tie_are_measured_for_those(is_frozen, own, tmp_path):
    """Of three experts the head counts by itself, and of two it is the embeddings again.

    Or the other way round: it is that only because the third expert has moved both.
    """
    third = str(shutil.copytree(own["a"], tmp_path / "c"))
    table = load_file(f"{own['base']}/model.safetensors")["model.embed_tokens.weight"]
    for path in (*own.values(), third):
        if is_frozen and path != third:
            edit(path, lambda it: it["model.embed_tokens.weight"].copy_(table))
        if is_frozen or path != third:
            edit(path, lambda it: it["lm_head.weight"].copy_(it["model.embed_tokens.weight"]))
    mergekit_metagpt.survey(own["base"], [own["a"], own["b"], third])
    found = mergekit_metagpt.survey(own["base"], [own["a"], own["b"]])
    exact = checkpoints(own).survey(products=True)
    assert found.squared_norms == exact.model
    assert found.figures.moved == exact.moved
    assert found.figures.tied == exact.tied
    assert ("lm_head.weight" in exact.tied) != is_frozen


def test_models_in_folders_of_one_snapshot_are_different_ones(family, tmp_path, passes):
    snapshot = tmp_path / "models--org--both" / "snapshots" / ("0123456789" * 4)
    paths = {name: str(shutil.copytree(path, snapshot / name)) for name, path in family.items()}
    norms = [mergekit_metagpt.survey(paths["base"], [paths[n]]).squared_norms for n in "ab"]
    assert len(passes) == len(set(norms)) == 2


def test_a_damaged_cache_is_no_cache(family, passes):
    expected = invoke("survey", *family.values(), "--json").stdout
    (file,) = cached()
    damages = [b"", b"{}", b"[1]", b"null", b'{"experts": 3}', file.read_bytes()[:-9]]
    for number, damage in enumerate(damages, 2):
        file.write_bytes(damage)
        assert invoke("survey", *family.values(), "--json").stdout == expected
        assert len(passes) == number


def test_where_no_cache_can_be_written_models_are_measured(family, monkeypatch, tmp_path, passes):
    with monkeypatch.context() as patch:
        (tmp_path / "file").touch()
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        mergekit_metagpt.survey(family["base"], [family["a"]])

    def write_a_part(path, text, encoding):
        path.write_bytes(text.encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_a_part)
        mergekit_metagpt.survey(family["base"], [family["a"]])
    folder = platformdirs.user_cache_path("mergekit-metagpt")
    assert not [path for path in folder.rglob("*") if not path.is_dir()]
    mergekit_metagpt.survey(family["base"], [family["a"]])
    assert len(passes) == 3
    assert len(cached()) == 1


def test_a_lora_expert_is_surveyed_as_it_is_merged_and_again_when_trained_again(
    family, tmp_path, passes
):
    words = ["--lora-merge-cache", tmp_path / "cache", "--json"]
    expert = f"{family['base']}+{tmp_path / 'lora'}"
    config = merge_config({"base": family["base"], "lora": expert, "a": family["a"]})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    norms = set()
    for seed in (1, 2):
        save_adapter(family["base"], tmp_path / "lora", seed=seed)
        shown = json.loads(invoke("survey", family["base"], expert, family["a"], *words).stdout)
        norm = dict(zip(shown["experts"], shown["squared_norms"], strict=True))[expert]
        planned = json.loads(invoke("coefficients", yml, *words).stdout)
        assert norm in [it["squared_norm"] for it in planned["experts"]]
        norms.add(norm)
    assert len(passes) == len(norms) == 2
