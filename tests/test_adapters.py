"""Adapters: those that do not fit their base get one sentence, the others a cache of their own."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import (
    invoke,
    lora,
    merge_config,
    problems_of,
    read,
    save_adapter,
    save_family,
    the_only,
    write_yaml,
)
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_metagpt
from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.planning.job import with_own_adapters
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.preflight.adapters import bad_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory) -> Path:
    return save_adapter(family["base"], tmp_path_factory.mktemp("trained") / "lora")


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy of an adapter that may be damaged."""
    return shutil.copytree(trained, tmp_path / "lora")


def config_of(base: str, adapter: Path | str) -> dict[str, Any]:
    return merge_config({"base": base, "adapted": f"{base}+{adapter}"})


@pytest.fixture
def problems(family, tmp_path) -> Callable[[Path], list[str]]:
    """Check a merge with an adapter of the base; return what is wrong."""
    cache = str(tmp_path / "cache")
    return lambda adapter: problems_of(
        config_of(family["base"], adapter), tmp_path, lora_merge_cache=cache
    )


def renamed(old: str, new: str) -> Damage:
    """Rename tensors of an adapter."""

    def damage(adapter: Path) -> None:
        held = load_file(adapter / WEIGHTS)
        save_file({re.sub(old, new, name): t for name, t in held.items()}, adapter / WEIGHTS)

    return damage


def settings(**changes: Any) -> Damage:
    """Change an adapter's config; None removes a key."""

    def damage(adapter: Path) -> None:
        raw = {**json.loads((adapter / CONFIG).read_text()), **changes}
        raw = {key: value for key, value in raw.items() if value is not None}
        (adapter / CONFIG).write_text(json.dumps(raw))

    return damage


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "half of its tensors have another name": (
        renamed("q_proj", "wq"),
        ("self_attn.wq.lora_A", "and 5 more", "PEFT would not apply", "trained on"),
    ),
    "its config names a module more": (
        settings(target_modules=["q_proj", "down_proj", "v_proj"]),
        ("lacks tensor", "v_proj.lora_A", "and 5 more", CONFIG),
    ),
    "its config names a module less": (
        settings(target_modules=["q_proj"]),
        ("holds tensor", "down_proj.lora_A", CONFIG),
    ),
    "its config names no module of the base": (
        settings(target_modules=["wq"]),
        ("PEFT cannot apply", "Target modules {'wq'} not found in the base model", "trained on"),
    ),
    "it lacks what its config says it has": (
        settings(use_dora=True),
        ("lacks tensor", "magnitude"),
    ),
    "its kind is missing": (settings(peft_type=None), ("PEFT cannot apply", CONFIG)),
    "its config is missing": (
        lambda adapter: (adapter / CONFIG).unlink(),
        (f"has no {CONFIG}", "or list it as a model of its own if it is a whole one."),
    ),
    "its config is cut": (
        lambda adapter: (adapter / CONFIG).write_text('{"peft_type": '),
        (CONFIG, "is corrupt (Expecting value: line 1", "save the adapter again"),
    ),
    "its weights are missing": (
        lambda adapter: (adapter / WEIGHTS).unlink(),
        (f"has no weights ({WEIGHTS})",),
    ),
    "its weights are noise": (
        lambda adapter: (adapter / WEIGHTS).write_bytes(bytes(999)),
        (WEIGHTS, "corrupt"),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_adapter_is_refused_if(what, family, adapter, problems, tmp_path):
    damage, parts = DAMAGES[what]
    damage(adapter)
    the_only(problems(adapter), str(adapter), *parts)
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"), quiet=True)
    with pytest.raises(ValueError, match=re.escape(CONFIG) + "|adapter"):  # nor measured
        mergekit_metagpt.survey(family["base"], [f"{family['base']}+{adapter}"], options=options)
    assert not (tmp_path / "cache").exists()


WHOLE = [
    lora(rank_pattern={"layers.1.*q_proj": 4}, use_dora=True, bias="all"),
    lora(target_modules=["embed_tokens", "q_proj", "not_there"], modules_to_save=["lm_head"]),
    lora(target_modules="all-linear"),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.VeraConfig(r=2, target_modules=["q_proj"]),
]
UNMERGEABLE = [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    peft.PolyConfig(r=2, target_modules=["q_proj"]),
]


@pytest.mark.parametrize("kind", [*WHOLE, *UNMERGEABLE])
def test_whole_adapters_are_no_problem_unless_peft_cannot_merge_them(
    kind, family, problems, tmp_path
):
    found = problems(save_adapter(family["base"], tmp_path / "adapter", kind))
    assert len(found) == (kind in UNMERGEABLE)
    assert all("PEFT cannot apply adapter" in problem for problem in found)


def test_an_adapter_is_planned_without_being_applied_and_needs_a_cache(family, adapter, tmp_path):
    config, cache = config_of(family["base"], adapter), tmp_path / "cache"
    yml = str(write_yaml(tmp_path / "merge.yml", config))
    the_only(problems_of(config, tmp_path), "pass --lora-merge-cache DIRECTORY")
    costs = inspect(yml, options=MergeOptions(lora_merge_cache=str(cache))).costs
    assert not cache.exists()
    assert costs.bytes_applied == sum(tensor.nbytes for tensor in read(family["base"]).values())


def test_what_peft_once_applied_in_part_is_refused_from_the_cache_too(family, adapter, tmp_path):
    renamed("q_proj", "wq")(adapter)
    model = ModelReference.model_validate(f"{family['base']}+{adapter}")
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        model.merged(str(tmp_path / "cache"))
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    files = find_model_files(model, options)
    assert (files.to_apply, files.problems) == (None, ())
    the_only(bad_adapters(files, options), "self_attn.wq.lora_A")


@pytest.mark.skipif(version("peft") < "0.19", reason="PEFT does not know them")
def test_names_that_peft_knows_as_older_ones_are_no_problem(tmp_path):
    """Transformers 4 kept each expert of a layer as a module of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.MixtralConfig(vocab_size=64, **sizes, **heads)
    base = save_family(tmp_path, config)["base"]
    adapter = save_adapter(base, tmp_path / "lora", lora(target_modules=["q_proj"]))
    settings(target_modules=["w1", "w2", "w3"])(adapter)
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts"
    shapes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    held = {
        f"{stem}.{expert}.{name}.lora_{side}.weight": torch.ones(*shape)
        for expert in range(2)
        for name, (out, inner) in shapes.items()
        for side, shape in (("A", (2, inner)), ("B", (out, 2)))
    }
    save_file(held, adapter / WEIGHTS)
    files = find_model_files(ModelReference.model_validate(f"{base}+{adapter}"), MergeOptions())
    assert list(bad_adapters(files, MergeOptions())) == []
    held.pop(f"{stem}.1.w2.lora_B.weight")
    save_file(held, adapter / WEIGHTS)
    assert len(bad_adapters(files, MergeOptions())) == 1


def test_every_command_finds_the_same_directory_and_the_record_names_the_adapter(family, tmp_path):
    adapter = save_adapter(family["base"], tmp_path / "lora")
    yml = write_yaml(tmp_path / "merge.yml", config_of(family["base"], adapter))
    cache = tmp_path / "cache"
    for out in ("first", "again"):
        invoke("merge", yml, tmp_path / out, "--quiet", "--lora-merge-cache", cache)
    before = sorted(cache.rglob("*"))
    for command in ("coefficients", "resolve", "check"):
        invoke(command, yml, "--quiet", "--lora-merge-cache", cache)
    costs = inspect(str(yml), options=MergeOptions(lora_merge_cache=str(cache))).costs
    assert costs.bytes_applied == 0
    assert sorted(cache.rglob("*")) == before
    record = json.loads((tmp_path / "first" / "metagpt.json").read_text())
    recorded = [entry["adapter"] for entry in record["inputs"] if "adapter" in entry]
    size, content = (adapter / WEIGHTS).stat().st_size, sha256_of(adapter / WEIGHTS)
    assert recorded == [[{"name": WEIGHTS, "bytes": size, "sha256": content}]]


def directory(config: dict[str, Any], **options: Any) -> str | None:
    """Return the cache that a merge uses."""
    given = MergeOptions(**{"lora_merge_cache": "cache", **options})
    parsed = MergeConfiguration.model_validate(config)
    found = with_own_adapters(given, parsed)
    assert with_own_adapters(found, parsed) == found
    return found.lora_merge_cache


def test_the_directory_depends_on_the_files_and_the_dtype(family, tmp_path, monkeypatch):
    found = set()
    for project in ("one", "two"):
        (tmp_path / project).mkdir()
        monkeypatch.chdir(tmp_path / project)
        save_adapter(family["base"], Path("lora"), seed=len(found))
        found.add(directory(config_of(family["base"], "./lora")))
    found.add(directory(config_of(family["a"], "./lora")))
    found.add(directory(config_of(family["base"], "./lora"), lora_merge_dtype="float16"))
    save_adapter(family["base"], Path("lora"), lora(lora_alpha=80), seed=1)
    found.add(directory(config_of(family["base"], "./lora")))
    assert len(found) == 5
    assert all(Path(str(place)).parent == Path("cache") for place in found)


def test_without_adapters_or_a_cache_nothing_changes(family):
    assert directory(merge_config(family)) == "cache"
    assert directory(config_of(family["base"], "lora"), lora_merge_cache=None) is None
