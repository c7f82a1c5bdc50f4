"""No merge loses a weight: it holds every parameter of the base, or is refused beforehand.

Of the kinds of models that need not be mergeable, a third is tried; with ``--fuzz 1``, all are.
"""

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import transformers
from conftest import edit, merge_config, problems_of, read, save_family, slices_config, the_only
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What the configs of transformers call their sizes.
NAMES: dict[int, str] = {
    32: "vocab_size n_vocab max_position_embeddings n_positions n_ctx image_size",
    24: "intermediate_size d_ff ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "moe_intermediate_size shared_expert_intermediate_size",
    16: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim kv_lora_rank "
    "q_lora_rank patch_size",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_key_value_heads num_experts_per_tok",
    1: "n_group topk_group first_k_dense_replace",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
# What sizes alone do not make a valid config of.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 4},
    "modernbert-decoder": {"pad_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}
# Settings that add weights, some of which MergeKit does not know.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("llama", {"tie_word_embeddings": True}),
]
# What merges, whichever version of transformers it is: nothing of these may be refused.
MERGEABLE = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "granite", "llama", "mamba",
    "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
LARGEST = 620_000  # parameters of a tiny model


def tiny_settings(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Return settings that make a config of transformers tiny, with those in it."""
    known = kind().to_dict()
    settings = {
        key: size
        for key, size in SIZES.items()
        if key in known and not isinstance(known[key], list | dict)
    }
    if "pad_token_id" in known:
        settings["pad_token_id"] = None
    for name, inner in kind.sub_configs.items():
        if isinstance(inner, type) and inner is not transformers.AutoConfig:
            settings[name] = tiny_settings(inner)
    return settings


def why_not_tiny(kind: str) -> str:
    """Return why a kind of model cannot be made tiny; empty if it can."""
    try:
        config = tiny_config(kind)
        getattr(config, "validate", bool)()  # as saving it does
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any of the many configs
        return f"{kind}: {type(error).__name__}: {error}"
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{kind}: {size:,} parameters" if size > LARGEST else ""


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    settings = {**tiny_settings(CONFIG_MAPPING[kind]), **SPECIAL.get(kind, {}), **changes}
    return CONFIG_MAPPING[kind](**settings)


def merge_or_problems(
    config: PretrainedConfig, directory: Path, auto: Any = AutoModelForCausalLM
) -> list[str]:
    """Merge one expert, and assert that the merge is the expert; or return what forbids it."""
    paths = save_family(directory, config, scales=(0.01,), auto=auto)
    written = merge_config(paths)
    if problems := problems_of(written, directory):
        return problems
    run_merge(
        MergeConfiguration.model_validate(written),
        str(directory / "merged"),
        MergeOptions(quiet=True, copy_tokenizer=False),
    )
    found, expected = read(directory / "merged"), read(paths["a"])
    if found.keys() != expected.keys():  # MergeKit writes some names another way
        found, expected = map(loaded, (directory / "merged", paths["a"]))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    return []


def loaded(model: Path | str) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint by the names that transformers gives them."""
    (architecture,) = transformers.AutoConfig.from_pretrained(model).architectures
    kind = getattr(transformers, architecture)
    merged, loading = kind.from_pretrained(model, output_loading_info=True)
    assert not loading["missing_keys"]
    return merged.state_dict()


def pytest_generate_tests(metafunc):
    if "any_kind" in metafunc.fixturenames:
        kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if not metafunc.config.getoption("--fuzz"):
            kinds = [k for k in kinds if k in MERGEABLE or crc32(k.encode()) % 3 == 0]
        metafunc.parametrize("any_kind", kinds)


def test_a_merge_holds_every_weight_or_is_refused(any_kind, tmp_path):
    if reason := why_not_tiny(any_kind):
        assert any_kind not in MERGEABLE
        pytest.skip(reason)
    problems = merge_or_problems(tiny_config(any_kind), tmp_path)
    assert not (problems and any_kind in MERGEABLE)
    assert all(str(tmp_path) in problem for problem in problems)


def llava(kind: type[PretrainedConfig]) -> PretrainedConfig:
    text = tiny_settings(transformers.LlamaConfig)
    vision = tiny_settings(transformers.CLIPVisionConfig)
    return kind(
        text_config=transformers.LlamaConfig(**text).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16).to_dict(),
        image_token_index=31,
        image_grid_pinpoints=[[32, 32]],
    )


T5 = transformers.T5Config(
    **{**tiny_settings(transformers.T5Config), "d_kv": 4, "tie_word_embeddings": False},
    feed_forward_proj="gated-gelu",  # the one form of T5 that MergeKit describes
)
BERT = transformers.BertConfig(**tiny_settings(transformers.BertConfig))
SEEING = [llava(transformers.LlavaConfig), llava(transformers.LlavaNextConfig)]


@pytest.mark.parametrize(
    ("config", "auto", "refusal"),
    [
        *((tiny_config(kind, **its), AutoModelForCausalLM, "would drop") for kind, its in VARIANTS),
        (T5, AutoModelForSeq2SeqLM, None),
        (BERT, AutoModelForSequenceClassification, None),
        *((config, AutoModelForImageTextToText, "holds tensor") for config in SEEING),
    ],
)
def test_other_models_hold_every_weight_or_are_refused(config, auto, refusal, tmp_path):
    problems = merge_or_problems(config, tmp_path, auto)
    assert not problems or refusal
    assert all(f"{tmp_path / 'base'} holds tensor" in problem for problem in problems)
    assert all(refusal in problem for problem in problems)


LLAMA, GPT2 = "model.layers.0.attn", "transformer.h.0.attn"
BIASES = [f"model.layers.{number}.self_attn.q_proj.bias" for number in range(3)]


@pytest.mark.parametrize(
    ("kind", "slices", "computed", "lost"),
    [
        (
            "llama",
            (),
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
                f"{LLAMA}.masked_bias": torch.ones(2),
                "count": torch.ones(1, dtype=torch.int64),
                f"{LLAMA}.bias": torch.ones(1, 1, 4, 4),  # a mask
            },
            f"{LLAMA}.bias",
        ),
        ("gpt2", (), {f"{GPT2}.bias": torch.ones(4)}, f"{GPT2}.d_attn.bias"),
        # Layers that a slice does not name are left out on purpose.
        ("llama", ([[0, 1]], [[2, 3]]), {BIASES[1]: torch.ones(32)}, BIASES[2]),
    ],
)
def test_only_weights_are_missed(kind, slices, computed, lost, tmp_path):
    paths = save_family(tmp_path, tiny_config(kind, num_hidden_layers=3))
    config = slices_config(paths, *slices) if slices else merge_config(paths)

    def problems_with(**tensors: torch.Tensor) -> list[str]:
        for path in paths.values():
            edit(path, lambda held: held.update(tensors))
        return problems_of(config, tmp_path)

    assert problems_with() == []
    assert problems_with(**computed) == []
    the_only(problems_with(**{lost: torch.ones(4)}), f"base holds tensor {lost},")


def test_a_head_that_is_tied_to_the_embeddings_under_a_name_of_its_own(tmp_path):
    paths = save_family(tmp_path, tiny_config("gpt2"))
    for path in paths.values():
        edit(path, lambda it: it.update({"lm_head.weight": it["transformer.wte.weight"].clone()}))
    assert problems_of(merge_config(paths), tmp_path) == []


def test_modules_that_the_config_does_not_name(tmp_path):
    config = merge_config(save_family(tmp_path, T5, auto=AutoModelForSeq2SeqLM))
    parsed = MergeConfiguration.model_validate(config)
    names = get_architecture_info(parsed, MergeOptions()).modules
    assert len(names) > 1
    models = config.pop("models")
    for name in names:
        assert problems_of({**config, "modules": {name: {"models": models}}}, tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "changes", "lost"),
    [
        ("llama", {"attention_bias": True}, "self_attn.k_proj.bias and 7 more"),
        ("deepseek_v3", {}, "mlp.experts.0.down_proj.weight and 11 more"),
        ("mixtral", {}, ""),
        ("gpt2", {}, ""),
    ],
)
def test_the_stock_command_warns_where_a_survey_shows_a_loss(
    kind, changes, lost, tmp_path, merge, caplog
):
    paths = save_family(tmp_path, tiny_config(kind, **changes))
    for granularity in ("layer", "model"):
        caplog.clear()
        merge(merge_config(paths, parameters={"granularity": granularity}))
        said = [r.getMessage() for r in caplog.records if "the merge will drop" in r.getMessage()]
        assert len(said) == bool(lost)
        for warning in said:
            assert f"{paths['base']} holds tensor " in warning
            assert lost in warning
