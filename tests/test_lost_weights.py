"""No merge loses a weight: it holds every parameter of the base, or is refused beforehand."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, merge_config, save_family, slices_config, write_yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergekit_metagpt.preflight import inspect

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
    *((kind, {"attention_bias": True}) for kind in (
        "llama", "gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe", "cohere2", "olmo2",
    )),
    ("llama", {"mlp_bias": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("llama", {"tie_word_embeddings": True}),
]  # fmt: skip
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


@cache
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


def problems_of(config: dict[str, Any], directory: Path) -> list[str]:
    return inspect(str(write_yaml(directory / "merge.yml", config))).problems


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
    (architecture,) = transformers.AutoConfig.from_pretrained(paths["a"]).architectures
    kind = getattr(transformers, architecture)
    merged, loading = kind.from_pretrained(directory / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    found = merged.state_dict()
    for name, weight in kind.from_pretrained(paths["a"]).state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    return []


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_merge_holds_every_weight_or_is_refused(kind, tmp_path):
    if why_not_tiny(kind):
        pytest.skip(why_not_tiny(kind))
    problems = merge_or_problems(tiny_config(kind), tmp_path)
    assert not (problems and kind in MERGEABLE)
    assert all(str(tmp_path) in problem for problem in problems)


def test_few_kinds_are_left_out():
    left_out = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if why_not_tiny(kind)]
    assert len(left_out) < len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) / 5, left_out


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_merge_of_a_variant_holds_every_weight_or_is_refused(kind, changes, tmp_path):
    problems = merge_or_problems(tiny_config(kind, **changes), tmp_path)
    assert all("the merge would drop" in problem for problem in problems)
    assert all(f"{tmp_path / 'base'} holds tensor" in problem for problem in problems)


def llava(kind: type[PretrainedConfig]) -> PretrainedConfig:
    text = tiny_settings(transformers.LlamaConfig)
    vision = tiny_settings(transformers.CLIPVisionConfig)
    return kind(
        text_config=transformers.LlamaConfig(**text).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16).to_dict(),
        image_token_index=31,
        image_grid_pinpoints=[[32, 32]],
    )


@pytest.mark.parametrize(
    ("config", "auto"),
    [
        (lambda: llava(transformers.LlavaConfig), AutoModelForImageTextToText),
        (lambda: llava(transformers.LlavaNextConfig), AutoModelForImageTextToText),
        (
            lambda: transformers.ViTConfig(**tiny_settings(transformers.ViTConfig)),
            AutoModelForImageClassification,
        ),
    ],
)
def test_models_that_see_are_merged_whole_or_refused(config, auto, tmp_path):
    problems = merge_or_problems(config(), tmp_path, auto)
    assert all(str(tmp_path) in problem for problem in problems)


def add(model: str, **tensors: torch.Tensor) -> None:
    """Add tensors to an unsharded checkpoint."""
    file = Path(model, "model.safetensors")
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


class TestWhatIsNotLost:
    @pytest.fixture
    def own(self, tmp_path) -> dict[str, str]:
        return save_family(tmp_path, llama_config(tie_word_embeddings=True))

    @pytest.mark.parametrize(
        "name",
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias"],
    )
    def test_buffers_that_are_computed(self, name, own, tmp_path):
        for path in own.values():
            add(path, **{name: torch.ones(2), "count": torch.ones(1, dtype=torch.int64)})
        assert problems_of(merge_config(own), tmp_path) == []

    @pytest.mark.parametrize(("shape", "is_mask"), [((1, 1, 4, 4), True), ((4,), False)])
    def test_a_mask_is_told_from_a_bias_of_its_name(self, shape, is_mask, own, tmp_path):
        for path in own.values():
            add(path, **{"model.layers.0.attn.bias": torch.ones(shape)})
        assert (problems_of(merge_config(own), tmp_path) == []) == is_mask

    def test_what_transformers_ignores_itself(self, tmp_path):
        paths = save_family(tmp_path, tiny_config("gpt2"))
        for path in paths.values():
            add(path, **{"transformer.h.0.attn.bias": torch.ones(4)})
        assert problems_of(merge_config(paths), tmp_path) == []
        for path in paths.values():
            add(path, **{"transformer.h.0.attn.d_attn.bias": torch.ones(4)})
        (problem,) = problems_of(merge_config(paths), tmp_path)
        assert "holds tensor transformer.h.0.attn.d_attn.bias," in problem

    def test_a_head_that_is_tied_to_the_embeddings_under_a_name_of_its_own(self, tmp_path):
        paths = save_family(tmp_path, tiny_config("gpt2"))
        for path in paths.values():
            weights = load_file(Path(path, "model.safetensors"))
            add(path, **{"lm_head.weight": weights["transformer.wte.weight"].clone()})
        assert problems_of(merge_config(paths), tmp_path) == []

    def test_layers_that_no_slice_names(self, own, tmp_path):
        config = slices_config(own, [[0, 1]], [[2, 3]])
        assert problems_of(config, tmp_path) == []
        for path in own.values():
            add(path, **{"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})
        assert problems_of(config, tmp_path) == []
        for path in own.values():
            add(path, **{"model.layers.2.self_attn.q_proj.bias": torch.ones(32)})
        (problem,) = problems_of(config, tmp_path)
        assert "base holds tensor model.layers.2.self_attn.q_proj.bias," in problem

    def test_ends_of_models_that_a_frankenmerge_takes_from_one(self, own, tmp_path):
        config = {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": own["a"], "layer_range": [0, 2]}]},
                {"sources": [{"model": own["b"], "layer_range": [1, 3]}]},
            ],
        }
        assert problems_of(config, tmp_path) == []

    def test_modules_that_the_config_does_not_name(self, tmp_path):
        settings = tiny_settings(transformers.T5Config)
        t5 = transformers.T5Config(
            **{**settings, "d_kv": 4, "feed_forward_proj": "gated-gelu"},
            tie_word_embeddings=False,
        )
        paths = save_family(tmp_path, t5, auto=transformers.AutoModelForSeq2SeqLM)
        config = merge_config(paths)
        models = config.pop("models")
        names = get_architecture_info(
            MergeConfiguration.model_validate(merge_config(paths)), MergeOptions()
        ).modules
        assert len(names) > 1
        for name in names:
            config["modules"] = {name: {"models": models}}
            assert problems_of(config, tmp_path) == []


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize(
    ("kind", "changes", "lost"),
    [
        ("llama", {"attention_bias": True}, "self_attn.k_proj.bias and 7 more"),
        ("deepseek_v3", {}, "mlp.experts.0.down_proj.weight and 11 more"),
        ("llama", {}, ""),
        ("mixtral", {}, ""),
        ("gpt2", {}, ""),
    ],
)
def test_the_stock_command_warns_where_a_survey_shows_a_loss(
    kind, changes, lost, granularity, tmp_path, merge, caplog
):
    paths = save_family(tmp_path, tiny_config(kind, **changes))
    merge(merge_config(paths, parameters={"granularity": granularity}))
    warnings = [r.getMessage() for r in caplog.records if "the merge will drop" in r.getMessage()]
    assert len(warnings) == bool(lost)
    for warning in warnings:
        assert f"{paths['base']} holds tensor " in warning
        assert lost in warning
