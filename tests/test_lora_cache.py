"""The LoRA cache: what MergeKit keeps there is found again only by the same models."""

import json
from pathlib import Path
from typing import Any

from conftest import invoke, lora, save_adapter, write_yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.planning.job import with_own_adapters
from mergekit_metagpt.preflight import inspect


def config_of(base: str, adapter: Path | str) -> dict[str, Any]:
    expert = {"model": f"{base}+{adapter}"}
    return {"merge_method": "metagpt", "base_model": base, "models": [expert]}


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
    assert costs is not None
    assert costs.bytes_applied == 0
    assert sorted(cache.rglob("*")) == before
    record = json.loads((tmp_path / "first" / "metagpt.json").read_text())
    (recorded,) = (entry["adapter"] for entry in record["inputs"] if "adapter" in entry)
    file = adapter / "adapter_model.safetensors"
    assert recorded == [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
    ]


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
    plain = {**config_of(family["base"], "lora"), "models": [{"model": family["a"]}]}
    assert directory(plain) == "cache"
    assert directory(config_of(family["base"], "lora"), lora_merge_cache=None) is None
