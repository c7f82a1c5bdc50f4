"""Adapters that do not fit their base: one sentence, never a merge of a part of them."""

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
    lora,
    merge_config,
    read,
    save_adapter,
    save_family,
    write_yaml,
)
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import mergekit_metagpt
from mergekit_metagpt.planning.models import find_model_files
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.preflight.adapters import bad_adapters

CONFIG = "adapter_config.json"
Damage = Callable[[Path], Any]
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory) -> Path:
    return save_adapter(family["base"], tmp_path_factory.mktemp("trained") / "lora")


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy of an adapter that may be damaged."""
    return shutil.copytree(trained, tmp_path / "lora")


@pytest.fixture
def problems(family, tmp_path) -> Callable[[Path], list[str]]:
    """Check a merge with an adapter of the base; return what is wrong."""

    def look(adapter: Path) -> list[str]:
        config = merge_config({**family, "b": f"{family['base']}+{adapter}"})
        options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
        return inspect(str(write_yaml(tmp_path / "merge.yml", config)), options=options).problems

    return look


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors of an adapter."""

    def damage(adapter: Path) -> None:
        held = load_file(adapter / "adapter_model.safetensors")
        changed = change(held)
        save_file(held if changed is None else changed, adapter / "adapter_model.safetensors")

    return damage


def settings(**changes: Any) -> Damage:
    """Change an adapter's config; None removes a key."""

    def damage(adapter: Path) -> None:
        raw = {**json.loads((adapter / CONFIG).read_text()), **changes}
        raw = {key: value for key, value in raw.items() if value is not None}
        (adapter / CONFIG).write_text(json.dumps(raw))

    return damage


def renamed(old: str, new: str) -> Damage:
    return tensors(lambda held: {re.sub(old, new, name): t for name, t in held.items()})


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
    "its config is missing": (lambda adapter: (adapter / CONFIG).unlink(), (f"has no {CONFIG}",)),
    "its config is cut": (
        lambda adapter: (adapter / CONFIG).write_text('{"peft_type": '),
        (CONFIG, "is corrupt (Expecting value: line 1", "save the adapter again"),
    ),
    "its weights are missing": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        ("has no weights (adapter_model.safetensors)",),
    ),
    "its weights are noise": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(bytes(999)),
        ("adapter_model.safetensors", "corrupt"),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_adapter_is_refused_if(what, family, adapter, problems, tmp_path):
    damage, parts = DAMAGES[what]
    damage(adapter)
    (sentence,) = problems(adapter)
    assert sentence.endswith(".")
    assert str(adapter) in sentence
    for part in parts:
        assert part in sentence
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"), quiet=True)
    with pytest.raises(ValueError, match=re.escape(CONFIG) + "|adapter"):  # nor measured
        mergekit_metagpt.survey(family["base"], [f"{family['base']}+{adapter}"], options=options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "kind",
    [
        lora(rank_pattern={"layers.1.*q_proj": 4}, use_dora=True, bias="all"),
        lora(target_modules=["embed_tokens", "q_proj", "not_there"], modules_to_save=["lm_head"]),
        lora(target_modules="all-linear"),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
    ],
)
def test_whole_adapters_of_any_kind_are_no_problem(kind, family, problems, tmp_path):
    assert problems(save_adapter(family["base"], tmp_path / "adapter", kind)) == []


def test_an_adapter_is_planned_without_being_applied_and_needs_a_cache(family, adapter, tmp_path):
    config = merge_config({**family, "b": f"{family['base']}+{adapter}"})
    yml, cache = str(write_yaml(tmp_path / "merge.yml", config)), tmp_path / "cache"
    (sentence,) = inspect(yml).problems
    assert "pass --lora-merge-cache DIRECTORY" in sentence
    costs = inspect(yml, options=MergeOptions(lora_merge_cache=str(cache))).costs
    assert not cache.exists()
    assert costs.bytes_applied == sum(tensor.nbytes for tensor in read(family["base"]).values())


@pytest.mark.parametrize(
    "kind",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PolyConfig(r=2, target_modules=["q_proj"]),
    ],
)
def test_what_peft_cannot_merge_is_refused(kind, family, problems, tmp_path):
    (sentence,) = problems(save_adapter(family["base"], tmp_path / "adapter", kind))
    assert sentence.startswith("PEFT cannot apply adapter")


def test_a_whole_model_is_no_adapter(family, problems):
    (sentence,) = problems(Path(family["a"]))
    assert sentence.endswith("or list it as a model of its own if it is a whole one.")


def test_what_peft_once_applied_in_part_is_refused_from_the_cache_too(family, adapter, tmp_path):
    renamed("q_proj", "wq")(adapter)
    model = ModelReference.model_validate(f"{family['base']}+{adapter}")
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        model.merged(str(tmp_path / "cache"))
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    files = find_model_files(model, options)
    assert (files.to_apply, files.problems) == (None, ())
    (sentence,) = bad_adapters(files, options)
    assert "self_attn.wq.lora_A" in sentence


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
    tensors(lambda _: held)(adapter)
    files = find_model_files(ModelReference.model_validate(f"{base}+{adapter}"), MergeOptions())
    assert list(bad_adapters(files, MergeOptions())) == []
    held.pop(f"{stem}.1.w2.lora_B.weight")
    tensors(lambda _: held)(adapter)
    assert len(bad_adapters(files, MergeOptions())) == 1
