"""``mergekit-metagpt check``: what it costs to merge, or everything that stands against it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    invoke,
    llama_config,
    merge_config,
    problems_of,
    read,
    save_family,
    save_tokenizer,
    slices_config,
    the_only,
    write_yaml,
)
from damages import (
    NORM,
    both,
    configure,
    cut,
    edit_index,
    move_norm,
    overwrite,
    remove,
    reshard,
    rewrite,
)
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions

from mergekit_metagpt.preflight import Costs, inspect

Config = dict[str, Any]
Models = dict[str, str]
Change = Callable[[Models, Config], Any]
HEAD = "lm_head.weight"


@pytest.fixture
def compared(merge, tmp_path) -> Callable[..., Costs]:
    """Look at a merge, and make it; return what it was said to cost."""

    def run(config: Config, **options: Any) -> Costs:
        file = write_yaml(tmp_path / "merge.yml", config)
        costs = inspect(str(file), options=MergeOptions(**options)).costs
        merged = merge(config, **options).values()
        assert costs.tensors == len(merged)
        assert costs.parameters == sum(tensor.numel() for tensor in merged)
        assert costs.bytes_written == sum(tensor.nbytes for tensor in merged)
        return costs

    return run


def data_bytes(paths: Models) -> int:
    return sum(tensor.nbytes for model in paths.values() for tensor in read(model).values())


class TestPlan:
    @pytest.mark.parametrize(
        ("granularity", "passes", "changes"),
        [
            ("tensor", 1, {}),
            ("layer", 2, {}),
            ("model", 2, {"dtype": "float32", "out_dtype": "bfloat16"}),
        ],
    )
    def test_the_figures_are_those_of_the_real_merge(
        self, granularity, passes, changes, compared, tmp_path
    ):
        paths = save_family(tmp_path, llama_config(), dtype=torch.float16, max_shard_size="20KB")
        config = merge_config(paths, parameters={"granularity": granularity}, **changes)
        costs = compared(config, out_shard_size=parse_kmb("30K"))
        assert costs.passes == passes
        assert costs.bytes_read == passes * data_bytes(paths)
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
        assert costs.bytes_read == 3 * costs.bytes_written < data_bytes(family)

    @pytest.mark.parametrize("kind", ["llama", "mixtral"])
    def test_tied_and_converted_tensors_count_once(self, kind, compared, tmp_path):
        model = llama_config(tie_word_embeddings=True)
        if kind == "mixtral":
            settings = {**llama_config().to_dict(), "num_local_experts": 4, "num_hidden_layers": 2}
            model = transformers.MixtralConfig(**{**settings, "model_type": kind})
        paths = save_family(tmp_path, model)
        assert compared(merge_config(paths)).bytes_read == data_bytes(paths)

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

    def test_a_stock_method_without_a_base_is_checked_too(self, family, compared):
        models = [{"model": path, "parameters": {"weight": -0.5}} for path in family.values()]
        assert compared({"merge_method": "linear", "models": models}).tensors == 30


def of_b(damage: Callable[[str], Any]) -> Change:
    return lambda models, _: damage(models["b"])


def of_shards(damage: Callable[[str], Any]) -> Change:
    return of_b(both(reshard, damage))


def instead_of_weights(damage: Callable[[str], Any]) -> Change:
    return of_b(both(remove(SAFETENSORS), damage))


def list_link(models: Models, config: Config) -> None:
    link = Path(models["b"]).with_name("link")
    link.symlink_to(models["b"])
    config["models"].append({"model": str(link)})


def misname_module(_: Models, config: Config) -> None:
    config["modules"] = {"defualt": {"models": config.pop("models")}}


def slices(*ranges: list[list[int]], shorter: int | None = None) -> Change:
    """Merge slices, of which one may list a model less."""

    def change(models: Models, config: Config) -> None:
        config.pop("models", None)
        config.update(slices_config(models, *ranges))
        if shorter is not None:
            config["slices"][shorter]["sources"].pop()

    return change


def give_tokenizers(models: Models, _: Config) -> None:
    for name, words in (("base", "the cat"), ("a", "the cat sat"), ("b", "the dog")):
        save_tokenizer(models[name], *words.split())


SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, SHARD = "pytorch_model.bin", "model-00002-of-00006.safetensors"
# What is done to models or config, parts of the sentence about it, and what makes some right again.
REFUSED: dict[str, tuple[Any, ...]] = {
    "a model is not there": (of_b(shutil.rmtree), ("does not exist", "correct the path")),
    "it has no config": (of_b(remove("config.json")), ("no checkpoint", "config.json")),
    "its config is broken": (of_b(overwrite("config.json", b"{")), ("config.json", "cannot be")),
    "it is of no architecture": (of_b(lambda it: configure(it, architectures=None)), ("nothing",)),
    "it is noise": (of_b(overwrite(SAFETENSORS, bytes(999))), (SAFETENSORS, "corrupt")),
    "it is a pointer": (
        of_b(overwrite(SAFETENSORS, b"version https://git-lfs")), ("git lfs pull",)
    ),
    "it lacks a shard": (of_shards(remove(SHARD)), (SHARD, "is missing")),
    "it lacks its index": (of_shards(remove(INDEX)), ("no weights", "nor an index", "download it")),
    "it has an index and a file": (
        of_b(overwrite(INDEX, b'{"weight_map": {"x": "model.safetensors"}}')),
        ("holds both", "remove whichever"),
    ),
    "its index is broken": (of_shards(overwrite(INDEX, b"[")), (INDEX, "is corrupt")),
    "its index has a gap": (of_b(edit_index(lambda it: it.pop(NORM))), (NORM, "does not name")),
    "its index is stale": (of_b(edit_index(move_norm)), (NORM, "stale")),
    "its index leads out": (
        of_b(edit_index(lambda it: it.update({NORM: "../a/model.safetensors"}))),
        ("names ../a/model.safetensors", "outside of the model", "download it again"),
    ),
    "it is a broken pickle": (
        instead_of_weights(overwrite(PICKLE, b"PK\x03\x04")), (PICKLE, "corrupt")
    ),
    "it is a foreign pickle": (
        instead_of_weights(overwrite(PICKLE, b"cos\nsystem\n(S'true'\ntR.")),
        (PICKLE, "save it as safetensors"),
    ),
    "it says it is quantized": (
        of_b(lambda it: configure(it, quantization_config={"quant_method": "gptq"})),
        ("gptq", "checkpoint that it was made from"),
    ),
    "it has another name, too": (list_link, ("{b} under another name", "leave one of them out")),
    "a module is unknown": (misname_module, ("module defualt", "write default instead")),
    "a slice has no layer": (
        slices([[0, 1], [0, 1], [3, 0]]),
        ("layer_range [3, 0] of model {b}", "holds no layer; write the first layer, from 0"),
    ),
    "tokenizers give an id two meanings": (
        give_tokenizers,
        ("{b}", "Token 1 is 'dog'", "'cat'", "tokenizer: {{source: union}}"),
        lambda _, config: config.update(tokenizer={"source": "base"}),
    ),
    "the last slice has more models than the first": (
        slices([[0, 1]], [[1, 3]], shorter=0),
        ("leave model {b}", f"out of tensor {HEAD}", "first slice"),
        slices([[0, 1]], [[1, 3]], shorter=1),
    ),
    **{
        f"the head of {name} would be embeddings that are another tensor": (
            lambda models, _, name=name: rewrite(models[name], **{HEAD: None}),
            (f"Model {{{name}}} lacks tensor {HEAD}", "model.embed_tokens.weight"),
            lambda models, _, name=name: configure(models[name], tie_word_embeddings=True),
        )
        for name in ("base", "a")
    },
}  # fmt: skip
if os.name == "posix":
    REFUSED["it is a pipe"] = (
        instead_of_weights(lambda it: os.mkfifo(Path(it, SAFETENSORS))),
        ("cannot be read (it is a pipe",),
    )


@pytest.mark.parametrize("what", REFUSED)
def test_a_merge_is_refused_if(what, own, tmp_path):
    change, parts, *mend = REFUSED[what]
    config = merge_config(own)
    change(own, config)
    found = problems_of(config, tmp_path)
    the_only(found[:1] if "index" in what else found, *(part.format(**own) for part in parts))
    assert own["b"] in found[0] or what.startswith(("a module", "the head"))
    for its in mend:
        its(own, config)
        assert problems_of(config, tmp_path) == []


def test_a_config_that_is_not_there_is_named(tmp_path):
    done = invoke("check", tmp_path / "merge.yml", status=1)
    the_only(done.stderr.splitlines(), f"{tmp_path}/merge.yml", "cannot be read (No such file")


def test_what_mergekit_fails_to_plan_goes_by_its_weight_files(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    bare = transformers.BertConfig(**sizes, intermediate_size=48)
    config = merge_config(save_family(tmp_path / "bert", bare, auto=transformers.AutoModel))
    the_only(problems_of(config, tmp_path), "a merge of BertModel (", "with mergekit-pytorch")


def test_a_downloaded_model_is_named_by_its_directory_offline(family, tmp_path):
    cache = tmp_path / "cache" / "models--some--model"
    shutil.copytree(family["b"], cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    config = merge_config({**family, "b": "some/model"})
    found = problems_of(config, tmp_path, transformers_cache=str(tmp_path / "cache"))
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
