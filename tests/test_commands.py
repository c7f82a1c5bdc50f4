"""The stock commands, as a user types them: two in processes of their own, the rest in this one."""

import sys
from pathlib import Path

import peft
import pytest
import reference
import torch
import transformers
from click.testing import CliRunner
from conftest import (
    command,
    llama_config,
    merge_config,
    read,
    run,
    save_family,
    slices_config,
    write_yaml,
)
from mergekit.scripts import multimerge, run_yaml
from safetensors.torch import load_file

from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.roles import role_of


def in_a_process(name: str, *words: str | Path) -> str:
    done = run(command(name), *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def mergekit(main, *words: object) -> str:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stderr


def assert_merge_of(out: Path, paths: dict[str, str], granularity: str) -> None:
    base, *experts = map(read, paths.values())
    expected = reference.coefficients(base, experts, granularity)
    reference.assert_merged(read(out), base, experts, expected)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_mergekit_yaml_merges_to_a_model_that_loads_and_generates(family, out, tmp_path):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family))
    log = in_a_process("mergekit-yaml", config, out)
    assert_merge_of(out, family, "tensor")
    assert "Measuring task vectors" not in log
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


def test_mergekit_yaml_merges_a_lora_expert(family, out, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    paths = {"base": family["base"], "a": family["a"]}
    config = merge_config(paths, parameters={"granularity": "model"})
    config["models"].append({"model": f"{family['base']}+{tmp_path / 'lora'}"})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    cache = tmp_path / "cache"
    mergekit(run_yaml.main, yml, out, "--lora-merge-cache", cache)
    (applied,) = cache.iterdir()
    assert_merge_of(out, {**paths, "lora": str(applied)}, "model")


def test_mergekit_yaml_merges_by_direction(family, out, tmp_path):
    yml = write_yaml(
        tmp_path / "metagpt.yml", merge_config(family, parameters={"granularity": "direction"})
    )
    mergekit(run_yaml.main, yml, out)
    base, *experts = map(read, family.values())
    for name, tensor in read(out).items():
        merged = torch.empty_like(tensor)
        others = [expert[name] for expert in experts]
        role = role_of(name, tensor.shape, lambda other: None)
        merge_directions(base[name], others, Rule((1.0, 1.0)), role=role, name=name, out=merged)
        torch.testing.assert_close(tensor, merged)


def test_mergekit_multi_feeds_one_merge_into_another(out, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.03, 0.02))
    first = merge_config({name: paths[name] for name in ("base", "a", "b")}, name="first")
    second = merge_config(
        {"base": paths["base"], "first": "first", "c": paths["c"]},
        parameters={"granularity": "model"},
    )
    yml = write_yaml(tmp_path / "multi.yml", first, second)
    between = tmp_path / "between"
    mergekit(multimerge.main, yml, "--intermediate-dir", between, "--out-path", out)
    assert_merge_of(between / "first", {name: paths[name] for name in ("base", "a", "b")}, "tensor")
    paths = {"base": paths["base"], "first": str(between / "first"), "c": paths["c"]}
    assert_merge_of(out, paths, "model")


def test_mergekit_pytorch_merges_files(family, out, tmp_path):
    files = {name: str(Path(path, "model.safetensors")) for name, path in family.items()}
    pickled = tmp_path / "b.bin"
    torch.save(load_file(files["b"]), pickled)
    config = merge_config({**files, "b": str(pickled)}, parameters={"granularity": "model"})
    in_a_process("mergekit-pytorch", write_yaml(tmp_path / "metagpt.yml", config), out)
    assert_merge_of(out, family, "model")


def test_python_merges_with_nothing_imported_but_mergekit():
    program = """
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
tensors = [torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
print(merge_tensors(tensors, "metagpt", base_index=0).tolist())
models = {name: {"w": tensor} for name, tensor in zip("xyz", tensors)}
print(merge_state_dicts(models, "metagpt_ties", base="x")["w"].tolist())
"""
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    plain, ties = map(eval, done.stdout.splitlines())
    assert plain == pytest.approx([0.1, 2.7])
    assert ties == pytest.approx([1.0, 3.0])
