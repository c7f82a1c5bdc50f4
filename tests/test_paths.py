"""Models at any path: through every command and every function."""

import json
import os
import shutil
from pathlib import Path

import mergekit.config
import numpy as np
import pytest
import torch
import yaml
from conftest import assert_merge_of, invoke, merge_config, on_posix, problems_of, write_yaml
from mergekit.common import ModelPath, ModelReference

import mergekit_metagpt
from mergekit_metagpt.planning.config import ConfigFile

PLAIN = 'it\'s a "quoted", [red] #1: 100% {x}' if os.name == "posix" else "it's a [red] #1 {x}"
ODD = "C+D @home+ñ日本 ~"


@pytest.fixture
def odd(family, tmp_path) -> dict[str, str]:
    """The family, in directories of strange names."""
    places = {"base": tmp_path / PLAIN, "a": tmp_path / ODD, "b": tmp_path / ODD / PLAIN}
    return {name: str(shutil.copytree(family[name], places[name] / name)) for name in family}


def references(paths: dict[str, str]) -> dict[str, object]:
    """Return paths as a config has to name them."""
    return {name: {"model": {"path": it}} if "+" in it else it for name, it in paths.items()}


def test_every_command_takes_a_model_from_any_path(odd):
    where = Path(odd["b"]).parent
    yml = write_yaml(where / "merge it.yml", merge_config(references(odd)))
    for command in ("check", "compare"):
        invoke(command, yml)
    known = json.loads(invoke("coefficients", yml, "--json").stdout)["experts"]
    assert [expert["model"] for expert in known] == [odd["a"], odd["b"]]
    invoke("survey", *odd.values())
    invoke("resolve", yml, "-o", where / "stock.yml")
    invoke("check", where / "stock.yml")
    for number, shards in enumerate(("5B", "20K")):
        out = where / f"out {number}"
        invoke("merge", yml, out, "--no-copy-tokenizer", "--out-shard-size", shards)
        assert_merge_of(out, odd)
        invoke("check", out / "mergekit_config.yml")


def test_every_function_takes_a_model_from_any_path(odd, tmp_path):
    given = merge_config(references(odd))
    as_paths = merge_config({name: Path(path) for name, path in odd.items()})
    parsed = mergekit.config.MergeConfiguration.model_validate(given)
    as_references = merge_config(
        {name: ModelReference(model=ModelPath(path=path)) for name, path in odd.items()}
    )
    for number, config in enumerate((given, as_paths, parsed, as_references)):
        merged = mergekit_metagpt.merge(config, tmp_path / str(number))
        assert_merge_of(merged.path, odd)
        read_back = Path(merged.path, "mergekit_config.yml").read_text("utf-8")
        written = mergekit.config.MergeConfiguration.model_validate(yaml.safe_load(read_back))
        assert written.base_model == parsed.base_model
        plan = mergekit_metagpt.plan(config)
        assert [str(expert.model) for expert in plan.experts] == [odd["a"], odd["b"]]
    base, *experts = map(Path, odd.values())
    assert len(mergekit_metagpt.survey(base, experts).experts) == 2


def test_numbers_of_numpy_and_dtypes_of_torch_may_stand_in_a_dictionary(family):
    settings = {"weight": np.float32(0.5), "granularity": np.str_("model")}
    config = merge_config(family, parameters=settings, dtype=torch.float32)
    config["models"][0]["parameters"] = {"weight": np.array([0.5, 1.0])}
    config["models"] = tuple(config["models"])
    entry = mergekit_metagpt.plan(config).forecast.summary.entries[0]
    assert (entry.granularity, entry.priors[1]) == ("model", 0.5)
    with pytest.raises(ValueError, match=r"holds .* of type slice, which no merge config can;"):
        mergekit_metagpt.plan({**config, "parameters": {"weight": slice(2)}})


def test_what_mergekit_reads_as_an_adapter_stays_one(family, tmp_path, monkeypatch):
    """Although a directory has the whole name."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(family["base"])
    Path("model+lora").mkdir()
    config = ConfigFile("m.yml", "", merge_config({**family, "b": "model+lora"}))
    assert config.parse().models[1].model.lora == ModelPath(path="lora")


@on_posix
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("~/b", "~/b does not exist"),
        ("https://huggingface.co/org/name/tree/main", "does not exist"),
        ("C:\\models\\b", "C:\\models\\b does not exist"),
        ("/not/there/", "/not/there/ does not exist"),
        ("/not@there", "write one that has a + or @ as {{model: {{path: PATH}}}}"),
        ("{b}/model.safetensors", "is a file; name the directory"),
        ("{b}/", None),
        ("link", None),
        ("./b", None),
        ("../{here}/b/", None),
    ],
)
def test_spellings_of_a_path(name, said, family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    b = shutil.copytree(family["b"], tmp_path / "b")
    Path("link").symlink_to(b)
    named = {**family, "b": name.format(b=b, here=tmp_path.name)}
    found = problems_of(merge_config(named), tmp_path)
    if said is None:
        assert not found
        assert len(mergekit_metagpt.plan(merge_config(named)).experts) == 2
    else:
        (sentence,) = found
        assert said.format(b=b) in sentence
