"""The stock commands, as a user types them: one in a process of its own, the rest in this one."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import (
    assert_merge_of,
    command,
    llama_config,
    merge_config,
    run,
    save_family,
    slices_config,
    write_yaml,
)
from mergekit.scripts import merge_raw_pytorch, run_yaml
from safetensors.torch import load_file


def mergekit(main, *words: object) -> str:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stderr


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_mergekit_yaml_merges_to_a_model_that_loads_and_generates(family, config, out):
    done = run(command("mergekit-yaml"), config, out)
    assert done.returncode == 0, done.stderr
    assert_merge_of(out, family, "tensor")
    assert "Measuring task vectors" not in done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=5, min_new_tokens=5)
    assert tokens.shape == (1, 8)
    card = (out / "README.md").read_text()
    assert "using the [MetaGPT](https://arxiv.org/abs/2406.11385) merge method" in card


def test_mergekit_yaml_merges_slices_of_sharded_checkpoints_into_shards(passes, out, tmp_path):
    paths = save_family(tmp_path, llama_config(), max_shard_size="20KB")
    assert len(list(Path(paths["a"]).glob("model-*.safetensors"))) > 1
    config = slices_config(paths, [[0, 2]], [[2, 3]], parameters={"granularity": "layer"})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    log = mergekit(run_yaml.main, yml, out, "--async-write", "--out-shard-size", "10K")
    assert "Measuring task vectors" in log
    assert len(passes) == 1
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert_merge_of(out, paths, "layer")


@pytest.mark.xfail(
    sys.version_info >= (3, 13), reason="MergeKit 0.1.5: --lazy-unpickle", strict=True
)
def test_mergekit_yaml_merges_modules_of_pickled_checkpoints(out, tmp_path):
    paths = save_family(tmp_path, llama_config())
    for path in paths.values():
        file = Path(path, "model.safetensors")
        torch.save(load_file(file), Path(path, "pytorch_model.bin"))
        file.unlink()
    config = merge_config(paths, parameters={"granularity": "model"})
    config["modules"] = {"default": {"models": config.pop("models")}}
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    log = mergekit(run_yaml.main, yml, out, "--lazy-unpickle", "--quiet")
    assert "Measuring task vectors" not in log
    assert_merge_of(out, paths, "model")


def test_mergekit_pytorch_merges_what_mergekit_yaml_cannot(out, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    bert = transformers.BertConfig(**sizes, intermediate_size=48)
    paths = save_family(tmp_path, bert, auto=transformers.AutoModel)
    files = {name: str(Path(path, "model.safetensors")) for name, path in paths.items()}
    config = merge_config(files, parameters={"granularity": "model"})
    mergekit(merge_raw_pytorch.main, write_yaml(tmp_path / "metagpt.yml", config), out)
    assert_merge_of(out, paths, "model")
