"""``mergekit-metagpt check``: what it costs to merge, or everything that stands against it."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import peft
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import (
    llama_config,
    merge_config,
    on_posix,
    read,
    save_family,
    slices_config,
    write_yaml,
)
from mergekit.common import parse_kmb
from mergekit.scripts import merge_raw_pytorch
from safetensors.torch import load_file, save_file

from mergekit_metagpt.cli import main
from mergekit_metagpt.planning.config import read_config
from mergekit_metagpt.preflight import Costs, inspect

Config = dict[str, Any]
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def own(family, tmp_path) -> dict[str, str]:
    """A copy of the family that may be damaged."""
    paths = {name: str(tmp_path / "models" / name) for name in family}
    for name, path in family.items():
        shutil.copytree(path, paths[name])
    return paths


@pytest.fixture
def check(tmp_path) -> Callable[..., Result]:
    """Run the command on a config."""

    def invoke(config: Config, *words: str | Path) -> Result:
        file = write_yaml(tmp_path / "merge.yml", config)
        done = CliRunner().invoke(main, ["check", str(file), *map(str, words)])
        assert isinstance(done.exception, SystemExit | None)
        return done

    return invoke


@pytest.fixture
def problems(check) -> Callable[..., list[str]]:
    """Run the command on a config that cannot be merged; return what it says."""

    def invoke(config: Config, *words: str | Path) -> list[str]:
        done = check(config, *words)
        assert (done.exit_code, done.stdout) == (1, "")
        return done.stderr.splitlines()

    return invoke


@pytest.fixture
def plan(tmp_path, check) -> Callable[..., Costs]:
    """Check a config that can be merged; return what it will cost."""

    def invoke(config: Config, *words: str | Path, **options: Any) -> Costs:
        done = check(config, *words)
        assert (done.exit_code, done.stderr) == (0, "")
        from mergekit.options import MergeOptions

        found = inspect(str(tmp_path / "merge.yml"), options=MergeOptions(**options))
        assert found.costs is not None
        return found.costs

    return invoke


def the_only(sentences: list[str], *parts: str) -> None:
    (sentence,) = sentences
    assert sentence.endswith(".")
    for part in parts:
        assert part in sentence


def data_bytes(*models: str | Path) -> int:
    return sum(tensor.nbytes for model in models for tensor in read(model).values())


def rewrite(model: str, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (with None) remove tensors of an unsharded checkpoint."""
    file = Path(model, "model.safetensors")
    changed = {**load_file(file), **tensors}
    save_file({k: v for k, v in changed.items() if v is not None}, file, {"format": "pt"})


def reshard(model: str) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    Path(model, "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20KB")


def save_tokenizer(model: str, *words: str) -> None:
    vocabulary = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(model)


class TestPlan:
    @pytest.mark.parametrize(
        ("parameters", "passes"),
        [({}, 1), ({"granularity": "layer"}, 2), ({"granularity": "model"}, 2)],
    )
    @pytest.mark.parametrize("changes", [{}, {"dtype": "float32", "out_dtype": "bfloat16"}])
    def test_the_figures_are_those_of_the_real_merge(
        self, parameters, passes, changes, plan, merge, tmp_path
    ):
        paths = save_family(tmp_path, llama_config(), dtype=torch.float16, max_shard_size="20KB")
        config = merge_config(paths, parameters=parameters, **changes)
        expected = plan(config, out_shard_size=parse_kmb("30K"))
        merged = merge(config, out_shard_size=parse_kmb("30K"))
        out = tmp_path / "merged-0"
        assert expected.passes == passes
        assert expected.bytes_read == passes * data_bytes(*paths.values())
        assert expected.bytes_written == data_bytes(out)
        assert expected.shards == len(list(out.glob("model-*.safetensors"))) > 1
        assert expected.tensors == len(merged)
        assert expected.parameters == sum(tensor.numel() for tensor in merged.values())

    def test_the_plan_is_printed_and_nothing_is_written(self, family, check, tmp_path):
        done = check(merge_config(family, "metagpt_ties"), tmp_path / "out", "--out-shard-size=1K")
        assert done.exit_code == 0, done.output
        words = " ".join(done.stdout.replace("│", " ").split())
        for said in ("Method metagpt_ties", "Tensors 30", "Parameters 27,360", "models 1"):
            assert said in words
        for said in ("read 328.3 kB", "written 109.4 kB", "shards 30"):
            assert said in words
        assert "mergekit-metagpt coefficients and the merge itself find those." in words
        assert not (tmp_path / "out").exists()
        assert check(merge_config(family), "--quiet").stdout == ""

    def test_slices_of_some_layers_read_those_layers_only(self, family, plan, merge, tmp_path):
        config = slices_config(family, [[0, 1]], [[2, 3]])
        expected = plan(config)
        merge(config)
        assert expected.bytes_written == data_bytes(tmp_path / "merged-0")
        assert expected.bytes_read == 3 * expected.bytes_written < data_bytes(*family.values())

    def test_pickled_checkpoints_merge_by_modules(self, own, plan, merge, tmp_path):
        size = data_bytes(*own.values())
        for path in own.values():
            file = Path(path, "model.safetensors")
            torch.save(load_file(file), Path(path, "pytorch_model.bin"))
            file.unlink()
        config = merge_config(own)
        config["modules"] = {"default": {"models": config.pop("models")}}
        expected = plan(config)
        merge(config)
        assert (expected.bytes_read, expected.bytes_written) == (
            size,
            data_bytes(tmp_path / "merged-0"),
        )

    def test_tied_and_converted_tensors_count_once(self, plan, merge, tmp_path):
        mixtral = transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        for number, model in enumerate((llama_config(tie_word_embeddings=True), mixtral)):
            paths = save_family(tmp_path / str(number), model)
            expected = plan(merge_config(paths))
            merge(merge_config(paths))
            assert expected.bytes_written == data_bytes(tmp_path / f"merged-{number}")
            assert expected.bytes_read == data_bytes(*paths.values())

    def test_models_of_several_dtypes_merge_in_the_widest(self, own, plan, merge, tmp_path):
        rewrite(own["a"], **{NORM: torch.ones(32, dtype=torch.float64)})
        expected = plan(merge_config(own))
        merge(merge_config(own))
        assert expected.bytes_written == data_bytes(tmp_path / "merged-0")
        assert any("stored as F32, F64" in note for note in expected.notes)

    @pytest.mark.parametrize("source", ["base", "union"])
    def test_a_tokenizer_setting_aligns_other_vocabularies(self, source, plan, merge, tmp_path):
        paths = save_family(tmp_path, llama_config())
        paths["b"] = save_family(tmp_path / "other", llama_config(vocab_size=65))["b"]
        words = [f"w{number}" for number in range(64)]
        for name, path in paths.items():
            save_tokenizer(path, *words, *(["new"] if name == "b" else []))
        config = merge_config(paths, tokenizer={"source": source, "pad_to_multiple_of": 6})
        expected = plan(config)
        merged = merge(config)
        assert merged["model.embed_tokens.weight"].shape[0] == 66
        assert expected.bytes_written == data_bytes(tmp_path / "merged-0")

    def test_a_stock_method_without_a_base_is_checked_too(self, family, plan):
        models = [{"model": path, "parameters": {"weight": -0.5}} for path in family.values()]
        expected = plan({"merge_method": "linear", "models": models})
        assert (expected.base, len(expected.experts)) == (None, 3)

    def test_the_base_may_be_listed_among_the_models(self, family, plan):
        config = merge_config(family)
        config["models"].append({"model": family["base"]})
        assert len(plan(config).experts) == 2


def density(**changes: Any) -> Callable[[Config], None]:
    return lambda config: config["models"][0].update(parameters=changes)


CONFIGS: list[tuple[Callable[[Config], Any], tuple[str, ...]]] = [
    (lambda c: c.update(merge_method="metagtp"), ("metagtp", "write metagpt instead")),
    (lambda c: c.update(merge_method="metagpt_task_arithmetic"), ("write metagpt instead",)),
    (lambda c: c.update(merge_method="MetaGPT_TIES"), ("write metagpt_ties instead",)),
    (lambda c: c.update(merge_method="zzz"), ("use one of", "task_arithmetic")),
    (lambda c: c.pop("merge_method"), ("lacks merge_method",)),
    (lambda c: c.update(base_modle="x"), ("unknown key base_modle", "remove it")),
    (lambda c: c.update(paramters={}), ("unknown key paramters", "write parameters instead")),
    (lambda c: c.update(density=0.5), ("unknown key density", "move it under parameters")),
    (lambda c: c["models"][0].update(paramters={}), ("models[0] (/", "write parameters")),
    (lambda c: c.update(parameters={"densitty": 1}), ("densitty", "write density instead")),
    (density(densitty=0.5), ("densitty", "models[0] (/", "write density instead")),
    (density(granularity="model"), ("granularity", "models[0]", "of the whole merge")),
    (density(density=1.5), ("models[0] (/", "density must be a number from 0 to 1, not 1.5")),
    (density(density=[0.5, float("nan")]), ("density must be", "not nan")),
    (density(weight=-1), ("weight must be a finite number of at least 0, not -1",)),
    (density(weight=[{"value": 1, "filter": "mlp"}, {"value": "x"}]), ("weight must", "'x'")),
    (density(weight=float("inf")), ("weight must be", "not inf")),
    (lambda c: c.update(parameters={"exponent": -2}), ("exponent must be", "not -2")),
    (lambda c: c.update(parameters={"lambda": float("nan")}), ("lambda must be", "not nan")),
    (lambda c: c.update(parameters={"granularity": "modle"}), ("granularity must", "'modle'")),
    (lambda c: c.update(parameters={"weight": 0}), ("weight 0 for every tensor", "above 0")),
    (lambda c: c.pop("base_model"), ("has no base_model", "fine-tuned from")),
    (lambda c: c.update(models=[{"model": c["base_model"]}]), ("no expert", "add the models")),
    (lambda c: c["models"].append(c["models"][0]), ("twice at models", "leave one")),
    (lambda c: c.update(dtype="float8"), ("dtype float8", "write float")),
    (lambda c: c.update(chat_template="chatmll"), ("chat_template", "write chatml instead")),
    (lambda c: c.update(slices=[]) or c.pop("models"), ("Exactly one of 'models'",)),
    (lambda c: c.update(models=[{"modle": "x"}]), ("models[0].model",)),
    (lambda c: c.update(models="x"), ("has the text 'x' at models; write a list",)),
]


@pytest.mark.parametrize(("change", "parts"), CONFIGS)
def test_a_mistake_in_the_config_is_named_with_the_way_out(change, parts, family, problems):
    config = merge_config(family, "metagpt_ties")
    change(config)
    found = problems(config)
    assert "merge.yml" in found[0]
    if "unknown key base_modle" in parts or "models[0].model" in parts:
        found = found[-1:]
    the_only(found, *parts)


@pytest.mark.parametrize(
    ("method", "parameters", "parts"),
    [
        ("metagpt_breadcrumbs", {"gamma": -0.1}, ("gamma must be a number from 0 to 1",)),
        ("metagpt_della", {"epsilon": 2}, ("epsilon must be a number from 0 to 1",)),
        (
            "metagpt_della",
            {"density": 0.9, "epsilon": 0.2},
            ("density 0.9 and epsilon 0.2", "epsilon below 0.1"),
        ),
        ("dare_ties", {"density": -1, "weight": 1}, ("density must be a number from 0 to 1",)),
        ("task_arithmetic", {}, ("weight",)),
        ("task_arithmetic", {"weight": float("nan")}, ("weight must be finite",)),
    ],
)
def test_parameters_are_checked_as_the_method_needs_them(
    method, parameters, parts, family, problems
):
    found = problems(merge_config(family, method, parameters=parameters))
    for part in parts:
        assert part in found[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1", ("is not YAML", "line 1")),
        ("- a\n- b\n", ("is not a mapping",)),
        ("a: 1\n---\nb: 2\n", ("several merges", "mergekit-multi")),
        (b"\xff\xfe\x00", ("not in UTF-8, but in UTF-16", "save it as UTF-8")),
        (None, ("does not exist",)),
    ],
)
def test_a_file_that_is_no_config_is_named(text, parts, tmp_path):
    file = tmp_path / "merge.yml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = CliRunner().invoke(main, ["check", str(file)])
    assert done.exit_code == 1
    the_only(done.stderr.splitlines(), str(file), *parts)


def cut(model: str) -> None:
    file = Path(model, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])


def overwrite(name: str, content: bytes) -> Callable[[str], Any]:
    return lambda model: Path(model, name).write_bytes(content)


def remove(name: str) -> Callable[[str], None]:
    return lambda model: Path(model, name).unlink()


def lose_shard(model: str) -> None:
    reshard(model)
    sorted(Path(model).glob("model-*"))[1].unlink()


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[str], None]:
    def edit(model: str) -> None:
        reshard(model)
        file = Path(model, "model.safetensors.index.json")
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return edit


def move_norm(weight_map: dict[str, str]) -> None:
    weight_map[NORM] = next(file for file in weight_map.values() if file != weight_map[NORM])


def point_outside(to: str) -> Callable[[str], None]:
    return edit_index(lambda weight_map: weight_map.update({NORM: to}))


def lose_index(model: str) -> None:
    reshard(model)
    Path(model, "model.safetensors.index.json").unlink()


def break_index(model: str) -> None:
    reshard(model)
    Path(model, "model.safetensors.index.json").write_text("[")


def pickle_of(content: bytes) -> Callable[[str], None]:
    def pickled(model: str) -> None:
        Path(model, "model.safetensors").unlink()
        Path(model, "pytorch_model.bin").write_bytes(content)

    return pickled


def quantize(model: str) -> None:
    file = Path(model, "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def as_dtype(dtype: torch.dtype) -> Callable[[str], None]:
    return lambda model: rewrite(model, **{NORM: torch.ones(32).to(dtype)})


SAFETENSORS = "model.safetensors"
MODELS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "is not there": (shutil.rmtree, ("does not exist", "correct the path")),
    "has no config": (remove("config.json"), ("no checkpoint", "config.json")),
    "has a broken config": (overwrite("config.json", b"{"), ("config.json", "cannot be used")),
    "is of no architecture": (overwrite("config.json", b'{"model_type":"llama"}'), ("nothing",)),
    "has no weights": (remove(SAFETENSORS), ("no weights", "download it again")),
    "is truncated": (cut, (SAFETENSORS, "truncated", "download it again")),
    "is empty": (overwrite(SAFETENSORS, b""), (SAFETENSORS, "is empty")),
    "is noise": (overwrite(SAFETENSORS, bytes(999)), (SAFETENSORS, "corrupt")),
    "is a pointer": (overwrite(SAFETENSORS, b"version https://git-lfs"), ("git lfs pull",)),
    "lacks a shard": (lose_shard, ("model-00002-of-", "is missing")),
    "lacks its index": (lose_index, ("no weights", "nor an index")),
    "has an index and a file": (
        overwrite("model.safetensors.index.json", b'{"weight_map": {"x": "model.safetensors"}}'),
        ("holds both", "remove whichever"),
    ),
    "has a broken index": (break_index, ("model.safetensors.index.json", "is corrupt")),
    "has a stale index": (edit_index(move_norm), (NORM, "stale", "does not hold it")),
    "has an index with a gap": (edit_index(lambda i: i.pop(NORM)), (NORM, "does not name")),
    "has an index that leads out": (
        point_outside("../a/model.safetensors"),
        ("names ../a/model.safetensors", "outside of the model", "download it again"),
    ),
    "has an index that leads far out": (
        point_outside("/etc/passwd"),
        ("names /etc/passwd", "outside of the model", "download it again"),
    ),
    "is a broken pickle": (pickle_of(b"PK\x03\x04"), ("pytorch_model.bin", "corrupt")),
    "is a foreign pickle": (
        pickle_of(b"cos\nsystem\n(S'true'\ntR."),
        ("pytorch_model.bin", "save it as safetensors"),
    ),
    "lacks a tensor": (lambda m: rewrite(m, **{NORM: None}), (f"lacks tensor {NORM}", "complete")),
    "has a tensor more": (
        lambda m: rewrite(m, **{"head.weight": torch.ones(2), "x.inv_freq": torch.ones(2)}),
        ("holds tensor head.weight,", "would drop"),
    ),
    "has another shape": (
        lambda m: rewrite(m, **{NORM: torch.ones(33)}),
        (NORM, "[33]", "but [32]", "fine-tunes of one base"),
    ),
    "has other tokens": (
        lambda m: rewrite(m, **{"lm_head.weight": torch.ones(65, 32)}),
        ("lm_head.weight has shape [65, 32]", "tokenizer: {source: base}", "source: union"),
    ),
    "is in 8 bits": (as_dtype(torch.float8_e4m3fn), (NORM, "F8_E4M3", "quantized")),
    "is in integers": (as_dtype(torch.int8), (NORM, "I8", "cannot be merged")),
    "mixes integers and floats": (as_dtype(torch.int64), (NORM, "I64", "cannot be merged")),
    "says it is quantized": (quantize, ("gptq", "checkpoint that it was made from")),
}


@pytest.mark.parametrize("what", MODELS)
def test_an_expert_cannot_be_merged_if_it(what, own, problems):
    damage, parts = MODELS[what]
    damage(own["b"])
    found = problems(merge_config(own))
    the_only(found[:1] if "index" in what else found, own["b"], *parts)


def test_integer_buffers_that_all_models_hold_are_no_problem(own, plan):
    for path in own.values():
        rewrite(path, **{NORM: torch.ones(32, dtype=torch.int64)})
    assert plan(merge_config(own)).tensors == 30


def test_another_architecture_is_named(own, problems, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    other = transformers.MistralConfig(**sizes, intermediate_size=48, num_key_value_heads=2)
    own["b"] = save_family(tmp_path / "mistral", other)["b"]
    found = problems(merge_config(own))
    the_only(found, own["b"], "MistralForCausalLM", "LlamaForCausalLM", "--allow-crimes")


def test_what_mergekit_fails_to_plan_goes_by_its_weight_files(problems, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    bare = transformers.BertConfig(**sizes, intermediate_size=48)
    paths = save_family(tmp_path / "bert", bare, auto=transformers.AutoModel)
    the_only(problems(merge_config(paths)), "a merge of BertModel (", "with mergekit-pytorch")
    files = {name: str(Path(path, SAFETENSORS)) for name, path in paths.items()}
    yml = write_yaml(tmp_path / "files.yml", merge_config(files))
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    assert read(tmp_path / "out").keys() == read(paths["base"]).keys()


def test_a_deeper_expert_is_named(own, problems, tmp_path):
    own["b"] = save_family(tmp_path / "deep", llama_config(num_hidden_layers=4))["b"]
    the_only(problems(merge_config(own)), f"{own['b']} has 4 layers", "has 3", "write `slices:`")


@pytest.mark.parametrize("of", ["base", "a"])
def test_one_model_under_two_names_is_found(of, own, problems, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(own[of])
    for other in (f"{own[of]}/", os.path.relpath(own[of]), str(link)):
        config = merge_config(own)
        config["models"].append({"model": other})
        role = "the base" if of == "base" else "model"
        (found,) = problems(config)
        assert f"is {role} " in found
        assert "under another name" in found
        assert other in found


def test_tokenizers_that_give_an_id_two_meanings_are_found(own, problems, plan):
    save_tokenizer(own["base"], "the", "cat")
    save_tokenizer(own["a"], "the", "cat", "sat")
    save_tokenizer(own["b"], "the", "dog")
    config = merge_config(own)
    parts = (own["b"], "Token 1 is 'dog'", "'cat'", "tokenizer: {source: union}")
    the_only(problems(config), *parts)
    plan({**config, "tokenizer": {"source": "base"}})


def test_a_tokenizer_setting_needs_a_tokenizer(own, problems):
    found = problems(merge_config(own, tokenizer={"source": "base"}))
    the_only(found, f"base {own['base']} has no tokenizer", "leave that setting out")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda c: c["slices"][0]["sources"].pop(0), ("slices[0]", "does not list the base")),
        (lambda c: c["slices"][0]["sources"][1].update(layer_range=[0, 2]), ("same number",)),
        (lambda c: c["slices"][0].update(paramters=1), ("at slices[0]", "write parameters")),
        (
            lambda c: c["slices"][0]["sources"][1].update(parameters={"densitty": 1}),
            ("densitty", "at slices[0].sources[1] (/"),
        ),
        (
            lambda c: [s.update(layer_range=[2, 9]) for s in c["slices"][0]["sources"]],
            ("the layer_range [2, 9]", "at slices[0], but the model has 3 layers", "end it at 3"),
        ),
        *(
            (
                lambda c, given=given: [
                    s.update(layer_range=given) for s in c["slices"][0]["sources"]
                ],
                (f"the layer_range {given}", "holds no layer", "such as [0, 3]"),
            )
            for given in ([3, 0], [1, 1], [-1, 2])
        ),
        (
            lambda c: (
                [s.update(layer_range=[2, 3]) for s in c["slices"][0]["sources"]]
                and c.update(parameters={"granularity": "layer"})
            ),
            ("granularity: layer", "granularity: model"),
        ),
    ],
)
def test_slices_are_checked(change, parts, family, problems):
    config = slices_config(family, [[0, 1]])
    change(config)
    for part in parts:
        assert part in problems(config)[0]


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


class TestAdapters:
    @pytest.fixture
    def lora(self, family, tmp_path) -> str:
        model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, settings).save_pretrained(tmp_path / "lora")
        return str(tmp_path / "lora")

    def config(self, family: dict[str, str], lora: str) -> Config:
        config = merge_config(family)
        config["models"].append({"model": f"{family['base']}+{lora}"})
        return config

    def test_an_adapter_is_planned_without_being_applied(self, family, lora, plan, tmp_path):
        cache = tmp_path / "cache"
        config = self.config(family, lora)
        expected = plan(config, "--lora-merge-cache", cache, lora_merge_cache=str(cache))
        assert not cache.exists()
        assert expected.bytes_applied == data_bytes(family["base"])
        assert any(str(cache) in note for note in expected.notes)

    def test_an_adapter_needs_a_cache(self, family, lora, problems):
        the_only(problems(self.config(family, lora)), lora, "--lora-merge-cache DIRECTORY")

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"[1")])
    def test_a_broken_adapter_is_named(self, damage, file, family, lora, problems, tmp_path):
        damage(Path(lora, file))
        found = problems(self.config(family, lora), "--lora-merge-cache", tmp_path / "cache")
        the_only(found, lora)


class TestOutput:
    def test_an_input_is_not_overwritten(self, family, problems):
        for out in (family["a"], f"{family['a']}/", Path(family["a"], "merged")):
            the_only(problems(merge_config(family), out), family["a"], "is the input model")
        folder = Path(family["base"]).parent
        said = ("the folder that holds the input model", f"such as {folder / 'merged'}")
        the_only(problems(merge_config(family), folder), *said)

    def test_what_is_there_is_not_overwritten(self, family, problems, plan, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        plan(merge_config(family), out)
        (out / "notes.txt").touch()
        the_only(problems(merge_config(family), out), "is not empty", "choose another")
        (out / "mergekit_config.yml").touch()
        the_only(problems(merge_config(family), out), "holds an older merge")
        the_only(problems(merge_config(family), out / "notes.txt"), "is a file")

    def test_a_full_disk_is_noticed(self, family, problems, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=109_000))
        found = problems(merge_config(family), tmp_path / "not" / "yet")
        the_only(found, str(tmp_path), "109.0 kB left", "109.4 kB will be written", "make room")


class TestHub:
    @pytest.fixture
    def offline(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def test_a_name_that_cannot_be_looked_up_offline_is_named(self, family, problems, offline):
        found = problems(merge_config({**family, "b": "nobody/nothing"}))
        the_only(found, "nobody/nothing", "offline", "HF_HUB_OFFLINE", "download the model first")

    def test_a_downloaded_model_is_named_by_its_directory_offline(
        self, family, problems, offline, tmp_path
    ):
        cache = tmp_path / "cache" / "models--some--model"
        shutil.copytree(family["b"], cache / "snapshots" / "0123")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0123")
        config = merge_config({**family, "b": "some/model"})
        found = problems(config, "--transformers-cache", tmp_path / "cache")
        the_only(found, "some/model is downloaded", f"write its directory {cache}/snapshots/0123")


def test_all_problems_are_reported_at_once(own, problems):
    config = merge_config(own, "metagpt_tise", dtype="float8")
    config["parameters"] = {"densitty": 0.5, "density": 7, "exponent": -1}
    config["modles"] = []
    config["models"] += [{"model": own["a"] + "/"}, {"model": own["b"]}, {"model": "/not/there"}]
    cut(own["a"])
    rewrite(own["b"], **{NORM: None, "lm_head.weight": torch.ones(65, 32)})
    said = "\n".join(problems(config, own["base"]))
    for part in (
        "metagpt_tise",
        "float8",
        "densitty",
        "not 7",
        "not -1",
        "modles",
        "twice",
        "/not/there",
        "truncated",
        "is the input model",
    ):
        assert part in said


def test_tensors_are_compared_even_if_the_config_has_mistakes(own, problems):
    rewrite(own["b"], **{NORM: None, "lm_head.weight": torch.ones(65, 32)})
    config = merge_config(own, "metagtp", parameters={"weight": -1})
    config["models"] += [{"model": own["a"]}, {"model": "/not/there"}]
    said = "\n".join(problems(config))
    for part in ("metagtp", "not -1", "twice", "/not/there", f"lacks tensor {NORM}", "[65, 32]"):
        assert part in said


def test_no_damage_to_a_header_ends_in_a_traceback(own, tmp_path):
    file = Path(own["b"], SAFETENSORS)
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    yml = write_yaml(tmp_path / "merge.yml", merge_config(own))
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(0, 8 + length, (3,), generator=random).tolist():
            damaged[place] = int(torch.randint(0, 256, (1,), generator=random))
        file.write_bytes(damaged)
        assert all(problem.endswith(".") for problem in inspect(str(yml)).problems)


class TestUsage:
    @pytest.mark.parametrize("words", [[], ["a", "b", "c"], ["a", "--no-such-option"]])
    def test_wrong_usage_exits_with_2(self, words):
        assert CliRunner().invoke(main, ["check", *words]).exit_code == 2

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (KeyError(60), "KeyError: 60"),
            (TypeError("no sentence"), "TypeError: no sentence"),
            (MemoryError(), "MemoryError"),
            (ValueError("Not ours, but a whole sentence."), "ValueError: Not ours, but a whole"),
            (RuntimeError("size mismatch\n" * 999), "RuntimeError: size mismatch size mismatch"),
        ],
    )
    def test_an_unforeseen_failure_says_what_was_being_done(
        self, error, said, family, tmp_path, monkeypatch
    ):
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr("mergekit_metagpt.preflight.inspect", fail)
        words = ["check", str(write_yaml(tmp_path / "merge.yml", merge_config(family)))]
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
        assert done.stderr.startswith(f"Error: main check {words[1]} failed ({said}")
        assert done.stderr.endswith(
            "); run it again with --verbose for the traceback, and if that does not help, report "
            "it at https://github.com/mergekit-metagpt/mergekit-metagpt/issues.\n"
        )
        assert len(done.stderr) < 1000
        assert CliRunner().invoke(main, [*words, "--verbose"]).exception is error

    def test_a_failure_of_the_system_names_the_file(self, family, tmp_path, monkeypatch):
        def fail(*_: Any) -> None:
            raise PermissionError(13, "Permission denied", "/some/file")

        monkeypatch.setattr("mergekit_metagpt.preflight.inspect", fail)
        words = ["check", str(write_yaml(tmp_path / "merge.yml", merge_config(family)))]
        assert CliRunner().invoke(main, words).stderr == (
            f"Error: main check {words[1]} failed (Permission denied: /some/file); correct that, "
            "and run it again.\n"
        )


BOMB = "x0: &x0 [1]\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1}, ' * 9}]\n" for n in range(1, 12))
# Merge keys are multiplied while the text is read, before there are any values.
MERGE_BOMB = "x0: &x0 {a: 1}\n" + "".join(
    f"x{n}: &x{n} {{<<: [{f'*x{n - 1}, ' * 9}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize("bomb", [BOMB, MERGE_BOMB], ids=["lists", "merge keys"])
def test_aliases_of_aliases_are_refused(bomb, tmp_path):
    file = tmp_path / "merge.yml"
    file.write_text(bomb)
    found = inspect(str(file)).problems
    assert found == [
        f"Merge config {file} repeats values by aliases more than 1,000,000 times; write it with "
        "fewer aliases."
    ]


def test_a_top_level_anchor_that_is_used_by_every_model_is_no_bomb(family, tmp_path):
    shared = {"weight": [0.5] * 100}
    config = {"x": shared, **merge_config(family)}
    for model in config["models"]:
        model["parameters"] = shared
    file = write_yaml(tmp_path / "merge.yml", config)
    assert "&id001" in file.read_text()
    assert read_config(str(file)).parse().models[1].parameters == shared
    assert not inspect(str(file)).problems


@on_posix
def test_a_config_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.planning.yaml_file._LONGEST_TEXT", 1000)
    assert inspect("/dev/zero").problems == [
        "Merge config /dev/zero cannot be read (it does not end); name a YAML file."
    ]


@on_posix
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_weight_file_is_refused(name, own, tmp_path):
    Path(own["a"], "model.safetensors").unlink()
    os.mkfifo(Path(own["a"], name))
    file = write_yaml(tmp_path / "merge.yml", merge_config(own))
    (problem,) = inspect(str(file)).problems
    assert str(Path(own["a"], name)) in problem
    assert "it is a pipe or a device, not a file" in problem
    assert "download it again" in problem


def test_multi_gpu_without_a_gpu_is_refused(check, family, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    done = check(merge_config(family), "--multi-gpu")
    assert done.exit_code == 1
    assert done.stderr == (
        "--multi-gpu needs a GPU, and this machine has none; leave that option out.\n"
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert check(merge_config(family), "--multi-gpu").exit_code == 0
