"""What lies beside the weights of a merge describes them, whoever loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    edit,
    llama_config,
    lora,
    merge_config,
    read,
    save_adapter,
    save_family,
    save_tokenizer,
)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import mergekit_metagpt
from mergekit_metagpt.measure.loaders import forget_files

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
PROMPT = torch.tensor([[1, 5, 9, 33, 2, 60]])
GENERATION = "generation_config.json"


@pytest.fixture
def tied(tmp_path) -> dict[str, str]:
    """A base and two experts whose heads are their embeddings."""
    return save_family(tmp_path / "tied", llama_config(tie_word_embeddings=True))


def untie(path: str, dtype: torch.dtype = torch.float32) -> None:
    """Give a model a head of its own, as one more step of its training."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.config.tie_word_embeddings = False
    torch.manual_seed(5)
    head = model.get_input_embeddings().weight.detach()
    model.lm_head.weight = torch.nn.Parameter(head + 0.5 * torch.randn_like(head))
    model.save_pretrained(path)


def add_head(path: str) -> None:
    """Store a copy of the embeddings as the head, as some trainers do."""
    edit(path, lambda tensors: tensors.update({HEAD: tensors[TABLE].clone()}))


def give_tokenizer(path: str, *words: str) -> None:
    """Save a tokenizer of 64 words; the third ends a text."""
    words = (*words, *(f"w{n}" for n in range(len(words), 64)))
    names = ("unk_token", "bos_token", "eos_token")
    save_tokenizer(path, *words, **dict(zip(names, words, strict=False)))


def merge(config: dict[str, Any], tmp_path: Path, **options: Any) -> Path:
    forget_files()
    given = MergeOptions(**{"quiet": True, "copy_tokenizer": False, **options})
    return mergekit_metagpt.merge(config, tmp_path / "out", options=given).path


def said(model: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(model, "config.json").read_text())
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float()(PROMPT).logits
    return found


def assert_loads_as_merged(out: Path) -> None:
    """What transformers makes of the files computes with exactly the tensors in them."""
    config, tensors = transformers.AutoConfig.from_pretrained(out), read(out)
    is_one = HEAD not in tensors or torch.equal(tensors[HEAD], tensors[TABLE])
    assert config.tie_word_embeddings == is_one  # others than transformers 5 believe it
    config.tie_word_embeddings = False
    bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors.setdefault(HEAD, tensors[TABLE])
    bare.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(bare))


class TestTheHead:
    @pytest.mark.parametrize(
        ("dtype", "shards"), [(torch.float32, {}), (torch.bfloat16, {"out_shard_size": 20_000})]
    )
    def test_of_an_expert_is_not_tied(self, dtype, shards, tied, tmp_path):
        untie(tied["b"], dtype)
        out = merge(merge_config(tied), tmp_path, **shards)
        assert said(out) == {**said(tied["base"]), "tie_word_embeddings": False}
        assert_loads_as_merged(out)

    def test_of_an_adapter_is_not_tied(self, tied, tmp_path):
        save_adapter(tied["base"], tmp_path / "lora", lora(modules_to_save=["lm_head"]))
        config = merge_config({"base": tied["base"], "a": f"{tied['base']}+{tmp_path / 'lora'}"})
        out = merge(config, tmp_path, lora_merge_cache=str(tmp_path / "cache"))
        assert not torch.equal(read(out)[HEAD], read(out)[TABLE])
        assert_loads_as_merged(out)

    def test_of_the_last_slice_is_not_tied(self, tied, tmp_path):
        untie(tied["b"])
        pieces = [("a", [0, 2]), ("b", [2, 3])]
        slices = [{"sources": [{"model": tied[m], "layer_range": r}]} for m, r in pieces]
        out = merge({"merge_method": "passthrough", "slices": slices}, tmp_path)
        assert HEAD in read(out)
        assert_loads_as_merged(out)

    @pytest.mark.parametrize("is_stored", [False, True])
    def test_that_is_the_embeddings_stays_tied(self, is_stored, tied, tmp_path):
        for path in tied.values():
            if is_stored:
                add_head(path)
        out = merge(merge_config(tied), tmp_path)
        assert (HEAD in read(out)) == is_stored
        assert_loads_as_merged(out)

    def test_of_a_model_that_sees(self, tmp_path):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
        text = transformers.MistralConfig(vocab_size=64, **sizes, **heads)
        vision = transformers.PixtralVisionConfig(
            **sizes, num_attention_heads=4, image_size=32, patch_size=16
        )
        config = transformers.Mistral3Config(
            text_config=text.to_dict(), vision_config=vision.to_dict(), tie_word_embeddings=True
        )
        paths = save_family(tmp_path, config, auto=AutoModelForImageTextToText)
        for path in paths.values():
            parts = {"text_config": {**said(path)["text_config"], "dtype": "bfloat16"}}
            Path(path, "config.json").write_text(json.dumps({**said(path), **parts}))
        head = torch.randn(64, 16)
        tensors = {**read(paths["a"]), "language_model.lm_head.weight": head}
        save_file(tensors, Path(paths["a"], "model.safetensors"), {"format": "pt"})
        out = merge(merge_config(paths, dtype="torch.float16"), tmp_path)
        assert said(out)["tie_word_embeddings"] is False
        assert said(out)["text_config"]["dtype"] == said(out)["dtype"] == "float16"
        loaded = AutoModelForImageTextToText.from_pretrained(out)
        assert torch.equal(loaded.lm_head.weight, read(out)["language_model.lm_head.weight"])


class TestDtypes:
    @pytest.mark.parametrize("method", ["metagpt", "task_arithmetic"])
    def test_of_mixed_models_are_what_is_written(self, method, tmp_path):
        paths = save_family(tmp_path / "half", llama_config(), dtype=torch.bfloat16)
        paths["b"] = save_family(tmp_path / "full", llama_config())["b"]
        out = merge(merge_config(paths, method, parameters={"weight": 0.5}), tmp_path)
        assert {tensor.dtype for tensor in read(out).values()} == {torch.float32}
        assert said(out) == {**said(paths["base"]), "dtype": "float32"}
        assert list(said(out)) == list(said(paths["base"]))
        assert_loads_as_merged(out)

    @pytest.mark.parametrize("settings", [{}, {"out_dtype": "bfloat16"}])
    def test_that_are_right_keep_mergekits_bytes(self, settings, tmp_path):
        config = llama_config(rms_norm_eps=1e-5)
        paths = save_family(tmp_path / "family", config, dtype=torch.bfloat16)
        written = merge_config(paths, **settings)
        out, stock = merge(written, tmp_path), tmp_path / "stock"
        options = MergeOptions(quiet=True, copy_tokenizer=False)
        run_merge(MergeConfiguration.model_validate(written), str(stock), options)
        assert (out / "config.json").read_bytes() == (stock / "config.json").read_bytes()


class TestVocabularies:
    def test_are_as_large_as_what_is_written(self, tmp_path):
        paths = save_family(tmp_path / "family", llama_config())
        Path(paths["base"], "config.json").write_text(
            json.dumps({**said(paths["base"]), "vocab_size": 72}, indent=2)
        )
        out = merge(merge_config(paths), tmp_path)
        assert said(out)["vocab_size"] == 64
        assert_loads_as_merged(out)

    def test_of_two_sizes_are_told(self, tmp_path, caplog):
        one = save_family(tmp_path / "one", llama_config())
        two = save_family(tmp_path / "two", llama_config(vocab_size=70))
        pieces = [(one["a"], [0, 2]), (two["b"], [2, 3])]
        slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in pieces]
        merge({"merge_method": "passthrough", "slices": slices}, tmp_path)
        assert f"differ in rows ({TABLE} 64, {HEAD} 70); add" in caplog.text


class TestGenerationConfigs:
    @pytest.fixture
    def stops(self, tmp_path) -> dict[str, str]:
        """A family whose base has its stop tokens in its generation config alone."""
        paths = save_family(tmp_path / "family", llama_config())
        for path in paths.values():
            give_tokenizer(path, "<unk>", "<s>", "</s>", "<end>")
        generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "max_new_tokens": 61}
        Path(paths["base"], GENERATION).write_text(json.dumps(generation))
        return paths

    @pytest.mark.parametrize(
        "settings", [{"chat_template": "chatml"}, {"tokenizer": {"source": "union"}}]
    )
    def test_is_kept_with_the_same_ids(self, settings, stops, tmp_path, caplog):
        out = merge(merge_config(stops, **settings), tmp_path, copy_tokenizer=True)
        kept, given = ((Path(path) / GENERATION).read_bytes() for path in (out, stops["base"]))
        assert kept == given
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.generation_config.eos_token_id == [2, 3]
        assert not [r for r in caplog.records if GENERATION in r.getMessage()]

    def test_is_left_out_with_other_ids(self, stops, tmp_path, caplog):
        give_tokenizer(stops["a"], "<unk>", "<s>", "</s>", "other", "<end>")
        config = merge_config(stops, tokenizer={"source": stops["a"]})
        out = merge(config, tmp_path, copy_tokenizer=True)
        assert not (out / GENERATION).exists()
        (warning,) = (r.getMessage() for r in caplog.records if GENERATION in r.getMessage())
        assert f"{stops['base']}/{GENERATION} was not copied" in warning
        assert "token 3 is '<end>' there but 'other' in the merge" in warning

    @pytest.mark.parametrize("text", ["{", "[2]", '{"eos_token_id": [2, "3"]}'])
    def test_is_left_out_if_corrupt(self, text, stops, tmp_path, caplog):
        Path(stops["base"], GENERATION).write_text(text)
        give_tokenizer(stops["a"], "<unk>", "<s>", "</s>", "<end>", "<new>")
        config = merge_config(stops, tokenizer={"source": "union"})
        out = merge(config, tmp_path, copy_tokenizer=True)
        assert not (out / GENERATION).exists()
        assert f"{stops['base']}/{GENERATION} was not copied, since it is corrupt" in caplog.text
