"""``mergekit-metagpt check``: what it costs to merge, or everything that stands against it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import (
    invoke,
    llama_config,
    merge_config,
    on_posix,
    problems_of,
    read,
    save_family,
    save_tokenizer,
    slices_config,
    the_only,
    write_yaml,
)
from damages import NORM, cut, edit_index, overwrite, remove, reshard, rewrite
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions

from mergekit_metagpt.preflight import Costs, inspect

Config = dict[str, Any]
HEAD = "lm_head.weight"


@pytest.fixture
def problems(tmp_path) -> Callable[..., list[str]]:
    return lambda config, **options: problems_of(config, tmp_path, **options)


@pytest.fixture
def plan(tmp_path) -> Callable[..., Costs]:
    """Look at a config that can be merged; return what it will cost."""

    def run(config: Config, **options: Any) -> Costs:
        file = write_yaml(tmp_path / "merge.yml", config)
        found = inspect(str(file), options=MergeOptions(**options))
        assert found.problems == []
        assert found.costs is not None
        return found.costs

    return run


@pytest.fixture
def compared(plan, merge) -> Callable[..., Costs]:
    """Look at a merge, and make it; return what it was said to cost."""

    def run(config: Config, **options: Any) -> Costs:
        costs = plan(config, **options)
        merged = merge(config, **options).values()
        assert costs.tensors == len(merged)
        assert costs.parameters == sum(tensor.numel() for tensor in merged)
        assert costs.bytes_written == sum(tensor.nbytes for tensor in merged)
        return costs

    return run


def data_bytes(*models: str | Path) -> int:
    return sum(tensor.nbytes for model in models for tensor in read(model).values())


WIDER = {"dtype": "float32", "out_dtype": "bfloat16"}


class TestPlan:
    @pytest.mark.parametrize(
        ("granularity", "passes", "changes"),
        [("tensor", 1, {}), ("layer", 2, {}), ("model", 2, WIDER)],
    )
    def test_the_figures_are_those_of_the_real_merge(
        self, granularity, passes, changes, compared, tmp_path
    ):
        paths = save_family(tmp_path, llama_config(), dtype=torch.float16, max_shard_size="20KB")
        config = merge_config(paths, parameters={"granularity": granularity}, **changes)
        costs = compared(config, out_shard_size=parse_kmb("30K"))
        assert costs.passes == passes
        assert costs.bytes_read == passes * data_bytes(*paths.values())
        assert costs.shards == len(list(tmp_path.glob("merged-0/model-*.safetensors"))) > 1

    def test_the_plan_is_printed_and_nothing_is_written(self, family, tmp_path):
        yml = write_yaml(tmp_path / "merge.yml", merge_config(family, "metagpt_ties"))
        done = invoke("check", yml, tmp_path / "out", "--out-shard-size=1K")
        words = " ".join(done.stdout.replace("│", " ").split())
        for said in ("Tensors 30", "Parameters 27,360", "models 1"):
            assert said in words
        for said in ("read 328.3 kB", "written 109.4 kB", "shards 30"):
            assert said in words
        # A note is one line: a path in it can be copied.
        assert "mergekit-metagpt coefficients and the merge itself find those." in done.stdout
        assert not (tmp_path / "out").exists()
        assert invoke("check", yml, "--quiet").stdout == ""

    def test_slices_of_some_layers_read_those_layers_only(self, family, compared):
        costs = compared(slices_config(family, [[0, 1]], [[2, 3]]))
        assert costs.bytes_read == 3 * costs.bytes_written < data_bytes(*family.values())

    @pytest.mark.parametrize("kind", ["llama", "mixtral"])
    def test_tied_and_converted_tensors_count_once(self, kind, compared, tmp_path):
        model = llama_config(tie_word_embeddings=True)
        if kind == "mixtral":
            settings = {**llama_config().to_dict(), "num_local_experts": 4, "num_hidden_layers": 2}
            model = transformers.MixtralConfig(**{**settings, "model_type": kind})
        paths = save_family(tmp_path, model)
        assert compared(merge_config(paths)).bytes_read == data_bytes(*paths.values())

    def test_models_of_several_dtypes_merge_in_the_widest(self, own, compared):
        rewrite(own["a"], **{NORM: torch.ones(32, dtype=torch.float64)})
        compared(merge_config(own))

    def test_a_tokenizer_setting_aligns_other_vocabularies(self, compared, tmp_path):
        paths = save_family(tmp_path, llama_config())
        paths["b"] = save_family(tmp_path / "other", llama_config(vocab_size=65))["b"]
        words = [f"w{number}" for number in range(64)]
        for name, path in paths.items():
            save_tokenizer(path, *words, *(["new"] if name == "b" else []))
        compared(merge_config(paths, tokenizer={"source": "union", "pad_to_multiple_of": 6}))
        assert len(read(tmp_path / "merged-0")["model.embed_tokens.weight"]) == 66

    def test_a_stock_method_without_a_base_is_checked_too(self, family, plan):
        models = [{"model": path, "parameters": {"weight": -0.5}} for path in family.values()]
        assert plan({"merge_method": "linear", "models": models}).tensors == 30


def test_a_config_that_is_not_there_is_named(tmp_path):
    done = invoke("check", tmp_path / "merge.yml", status=1)
    the_only(done.stderr.splitlines(), f"{tmp_path}/merge.yml", "cannot be read (No such file")


def of_shards(damage: Callable[[str], Any]) -> Callable[[str], None]:
    return lambda model: reshard(model) or damage(model)


def pickle_of(content: bytes) -> Callable[[str], None]:
    def pickled(model: str) -> None:
        Path(model, "model.safetensors").unlink()
        Path(model, "pytorch_model.bin").write_bytes(content)

    return pickled


def quantize(model: str) -> None:
    file = Path(model, "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00006.safetensors"
MODELS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "is not there": (shutil.rmtree, ("does not exist", "correct the path")),
    "has no config": (remove("config.json"), ("no checkpoint", "config.json")),
    "has a broken config": (overwrite("config.json", b"{"), ("config.json", "cannot be used")),
    "is of no architecture": (overwrite("config.json", b'{"model_type":"llama"}'), ("nothing",)),
    "is noise": (overwrite(SAFETENSORS, bytes(999)), (SAFETENSORS, "corrupt")),
    "is a pointer": (overwrite(SAFETENSORS, b"version https://git-lfs"), ("git lfs pull",)),
    "lacks a shard": (of_shards(remove(SHARD)), (SHARD, "is missing")),
    "lacks its index": (of_shards(remove(INDEX)), ("no weights", "nor an index", "download it")),
    "has an index and a file": (
        overwrite(INDEX, b'{"weight_map": {"x": "model.safetensors"}}'),
        ("holds both", "remove whichever"),
    ),
    "has a broken index": (of_shards(overwrite(INDEX, b"[")), (INDEX, "is corrupt")),
    "has an index with a gap": (edit_index(lambda i: i.pop(NORM)), (NORM, "does not name")),
    "has an index that leads out": (
        edit_index(lambda i: i.update({NORM: "../a/model.safetensors"})),
        ("names ../a/model.safetensors", "outside of the model", "download it again"),
    ),
    "is a broken pickle": (pickle_of(b"PK\x03\x04"), ("pytorch_model.bin", "corrupt")),
    "is a foreign pickle": (
        pickle_of(b"cos\nsystem\n(S'true'\ntR."),
        ("pytorch_model.bin", "save it as safetensors"),
    ),
    "says it is quantized": (quantize, ("gptq", "checkpoint that it was made from")),
}


@pytest.mark.parametrize("what", MODELS)
def test_an_expert_cannot_be_merged_if_it(what, own, problems):
    damage, parts = MODELS[what]
    damage(own["b"])
    found = problems(merge_config(own))
    the_only(found[:1] if "index" in what else found, own["b"], *parts)


def test_what_mergekit_fails_to_plan_goes_by_its_weight_files(problems, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    bare = transformers.BertConfig(**sizes, intermediate_size=48)
    paths = save_family(tmp_path / "bert", bare, auto=transformers.AutoModel)
    the_only(problems(merge_config(paths)), "a merge of BertModel (", "with mergekit-pytorch")


def test_tokenizers_that_give_an_id_two_meanings_are_found(own, problems, plan):
    save_tokenizer(own["base"], "the", "cat")
    save_tokenizer(own["a"], "the", "cat", "sat")
    save_tokenizer(own["b"], "the", "dog")
    config = merge_config(own)
    parts = (own["b"], "Token 1 is 'dog'", "'cat'", "tokenizer: {source: union}")
    the_only(problems(config), *parts)
    plan({**config, "tokenizer": {"source": "base"}})


def test_a_slice_without_layers_is_found(family, problems):
    config = slices_config(family, [[0, 1]])
    for source in config["slices"][0]["sources"]:
        source["layer_range"] = [3, 0]
    for sentence in problems(config):
        assert "the layer_range [3, 0]" in sentence
        assert "holds no layer; write the first layer, from 0" in sentence


def test_a_last_slice_with_more_models_than_the_first_is_found(family, problems, plan, tmp_path):
    config = slices_config(family, [[0, 1]], [[1, 3]])
    last = config["slices"][0]["sources"].pop()
    the_only(problems(config), "leave model", last["model"], f"out of tensor {HEAD}", "first slice")
    fewer = slices_config(family, [[0, 1]], [[1, 3]])
    fewer["slices"][1]["sources"].pop()
    assert plan(fewer).tensors == 30


@pytest.mark.parametrize("of", ["base", "a"])
def test_a_head_is_not_replaced_by_embeddings_that_are_another_tensor(of, own, problems, plan):
    rewrite(own[of], **{HEAD: None})
    found = problems(merge_config(own))
    the_only(found, f"Model {own[of]} lacks tensor {HEAD}", "model.embed_tokens.weight")
    file = Path(own[of], "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    assert plan(merge_config(own)).tensors == 30


def test_an_unknown_module_is_named(family, problems):
    config = merge_config(family)
    config["modules"] = {"defualt": {"models": config.pop("models")}}
    the_only(problems(config), "module defualt", "write default instead")


def test_a_downloaded_model_is_named_by_its_directory_offline(family, problems, tmp_path):
    cache = tmp_path / "cache" / "models--some--model"
    shutil.copytree(family["b"], cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    config = merge_config({**family, "b": "some/model"})
    found = problems(config, transformers_cache=str(tmp_path / "cache"))
    the_only(found, "some/model is downloaded", f"write its directory {cache}/snapshots/0123")


def test_all_problems_are_reported_at_once(own, tmp_path):
    config = merge_config(own, "metagpt_ties", dtype="float8")
    config["parameters"] = {"densitty": 0.5}
    config["modles"] = []
    config["models"] += [{"model": own["a"] + "/"}, {"model": "/not/there"}]
    cut(own["a"])
    done = invoke("check", write_yaml(tmp_path / "merge.yml", config), own["base"], status=1)
    assert done.stdout == ""
    for part in ("float8", "densitty", "modles", "/not/there", "truncated", "is the input model"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError(60), "KeyError: 60"),
        (MemoryError(), "MemoryError"),
        (ValueError("Not ours, but a whole sentence."), "ValueError: Not ours, but a whole"),
        (RuntimeError("size mismatch\n" * 999), "RuntimeError: size mismatch size mismatch"),
        (PermissionError(13, "Permission denied", "/file"), "Permission denied: /file"),
    ],
)
def test_an_unforeseen_failure_is_one_sentence(error, said, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.preflight.inspect", Mock(side_effect=error))
    (line,) = invoke("check", "merge.yml", status=1).stderr.splitlines()
    assert line.startswith(f"Error: main check failed ({said}")
    end = "/mergekit-metagpt/issues." if not isinstance(error, OSError) else "and run it again."
    assert line.endswith(end)
    assert len(line) < 1000
    assert invoke("check", "merge.yml", "--verbose", status=1).exception is error


@on_posix
def test_a_pipe_in_place_of_a_weight_file_is_refused(own, tmp_path):
    file = Path(own["a"], "model.safetensors")
    file.unlink()
    os.mkfifo(file)
    said = f"{file} of model {own['a']} cannot be read (it is a pipe"
    the_only(problems_of(merge_config(own), tmp_path), said)
