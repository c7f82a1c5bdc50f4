"""The LoRA cache: what MergeKit keeps there is found again only by the same models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import invoke, read, write_yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.planning.job import with_own_adapters
from mergekit_metagpt.preflight import inspect


def train(base: str, adapter: Path, seed: int, **settings: Any) -> None:
    """Write an adapter, over one that is there."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    peft.get_peft_model(model, lora).save_pretrained(adapter)


def config_of(base: str, adapter: Path | str) -> dict[str, Any]:
    expert = {"model": f"{base}+{adapter}"}
    return {"merge_method": "metagpt", "base_model": base, "models": [expert]}


@pytest.fixture
def merged(family, tmp_path) -> Callable[[str], torch.Tensor]:
    """Merge with the adapter that is there now; return the one tensor that it changes."""
    yml = write_yaml(tmp_path / "merge.yml", config_of(family["base"], tmp_path / "lora"))

    def run(name: str) -> torch.Tensor:
        cache = ("--lora-merge-cache", tmp_path / "cache")
        invoke("merge", yml, tmp_path / name, "--quiet", *cache)
        return read(tmp_path / name)["model.layers.0.self_attn.q_proj.weight"]

    return run


def test_an_adapter_that_was_trained_again_is_applied_again(family, merged, tmp_path):
    train(family["base"], tmp_path / "lora", seed=1)
    first = merged("first")
    train(family["base"], tmp_path / "lora", seed=2)
    second = merged("second")
    assert not torch.allclose(second, first)
    train(family["base"], tmp_path / "lora", seed=2, lora_alpha=80)  # in its config alone
    assert not torch.allclose(merged("third"), second)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_every_command_finds_the_same_directory_and_the_record_names_the_adapter(
    family, merged, tmp_path
):
    train(family["base"], tmp_path / "lora", seed=1)
    first, before = merged("first"), sorted((tmp_path / "cache").rglob("*"))
    assert torch.equal(merged("again"), first)
    yml, cache = tmp_path / "merge.yml", tmp_path / "cache"
    for command in ("coefficients", "resolve", "diagnose", "check"):
        invoke(command, yml, "--quiet", "--lora-merge-cache", cache)
    costs = inspect(str(yml), options=MergeOptions(lora_merge_cache=str(cache))).costs
    assert costs is not None
    assert costs.bytes_applied == 0
    assert sorted(cache.rglob("*")) == before
    record = json.loads((tmp_path / "first" / "metagpt.json").read_text())
    (adapter,) = (entry["adapter"] for entry in record["inputs"] if "adapter" in entry)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    assert adapter == [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}]


class TestTheDirectory:
    def key(self, config: dict[str, Any], **options: Any) -> str | None:
        given = MergeOptions(**{"lora_merge_cache": "cache", **options})
        parsed = MergeConfiguration.model_validate(config)
        found = with_own_adapters(given, parsed)
        assert with_own_adapters(found, parsed) == found
        return found.lora_merge_cache

    def test_it_depends_on_the_files_and_the_dtype(self, family, tmp_path, monkeypatch):
        keys = set()
        for project in ("one", "two"):
            (tmp_path / project).mkdir()
            monkeypatch.chdir(tmp_path / project)
            train(family["base"], Path("lora"), seed=len(keys))
            keys.add(self.key(config_of(family["base"], "./lora")))
        keys.add(self.key(config_of(family["a"], "./lora")))
        keys.add(self.key(config_of(family["base"], "./lora"), lora_merge_dtype="float16"))
        assert len(keys) == 4
        assert all(Path(str(key)).parent == Path("cache") for key in keys)

    def test_without_adapters_or_a_cache_nothing_changes(self, family):
        plain = {**config_of(family["base"], "lora"), "models": [{"model": family["a"]}]}
        assert self.key(plain) == "cache"
        assert self.key(config_of(family["base"], "lora"), lora_merge_cache=None) is None
