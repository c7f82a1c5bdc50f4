"""The roles of tensors, for every architecture of language models that transformers can build."""

import inspect
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from mergekit_metagpt.core.roles import Role, role_of

LINEAR, TRANSPOSED, ROWS, ELEMENTS = Role

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
# Architectures whose default config builds no model.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 2}
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
}
# Other forms of an architecture.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2 with cross-attention": {"add_cross_attention": True},
    "gpt2 with a square mlp": {"n_inner": 768},
    "gpt_bigcode with multiple heads": {"multi_query": False, "n_inner": 768},
    "gpt_bigcode with cross-attention": {"multi_query": False, "add_cross_attention": True},
    "starcoder2 without biases": {"use_bias": False},
    "gemma4_text with experts": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 704,
    },
    "gpt_oss with wide experts": {"intermediate_size": 5760},
    "mixtral with square experts": {"intermediate_size": 4096},
    "nemotron_h with all kinds of layers": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    },
    "qwen4_exp_text with n-grams": {
        **_INDEXER,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "eos_token_id": 1,
    },
}

OF_TORCH: dict[type[nn.Module], Role] = {
    nn.Linear: LINEAR,
    Conv1D: TRANSPOSED,
    nn.Embedding: ROWS,
}
# What the modelling code does with the other parameters, unless _product reads it there.
RAW: dict[str, Role] = {
    # matmul(tokens, expert_weights[expert]), in older versions of transformers
    "AriaGroupedExpertsGemm.weight": TRANSPOSED,
    # F.embedding(bucket, relative_attention_bias)
    "CpmAntSegmentPositionEmbedding.relative_attention_bias": ROWS,
    # x.matmul(w1.T), x.matmul(v1.T), h.matmul(w2), each of a view for one expert
    "DbrxExpertGLU.w1": LINEAR,
    "DbrxExpertGLU.v1": LINEAR,
    "DbrxExpertGLU.w2": TRANSPOSED,
    # einsum("bhwc,hkc->bhwk", query, rel_pos_h[...])
    "GotOcr2VisionAttention.rel_pos_h": LINEAR,
    "GotOcr2VisionAttention.rel_pos_w": LINEAR,
    # scaled_dot_product_attention(query, states, states): scores of the states for a few queries
    "Inkling2BlockAttentionResidual.query": LINEAR,
    # bmm(hidden_states, gate_proj.transpose(1, 2))
    "InklingSharedExperts.gate_proj": LINEAR,
    "InklingSharedExperts.up_proj": LINEAR,
    "InklingSharedExperts.down_proj": LINEAR,
    # torch splits it into the weights of three linear layers
    "MultiheadAttention.in_proj_weight": LINEAR,
    # x_proj_weight[:, None] @ hidden_states
    "ZambaMambaMixer.x_proj_weight": LINEAR,
    "ZambaMambaMixer.dt_proj_weight": LINEAR,
    # Added to something, or multiplied element by element.
    "DeepseekV4CSACompressor.position_bias": ELEMENTS,
    "DeepseekV4HCACompressor.position_bias": ELEMENTS,
    "DeepseekV4Indexer.position_bias": ELEMENTS,
    "Ernie4_5_MoeStatics.e_score_correction_bias": ELEMENTS,
    "FalconMambaMixer.A_log": ELEMENTS,
    "GotOcr2VisionEncoder.pos_embed": ELEMENTS,
    "GptOssExperts.down_proj_bias": ELEMENTS,
    "GptOssExperts.gate_up_proj_bias": ELEMENTS,
    "Inkling2DynamicShortConvolution.static_weight": ELEMENTS,
    "Inkling2ScaledL2Clip.scale": ELEMENTS,
    "JambaMambaMixer.A_log": ELEMENTS,
    "KimiLinearForgetGate.A_log": ELEMENTS,
    "MambaMixer.A_log": ELEMENTS,
    "ParameterList.0": ELEMENTS,  # Reformer's positions along two axes
    "ParameterList.1": ELEMENTS,
    "Phi4MultimodalAudioGluPointWiseConv.b1": ELEMENTS,
    "Phi4MultimodalAudioGluPointWiseConv.b2": ELEMENTS,
    "Phi4MultimodalImageEmbedding.global_img_feature_extensor": ELEMENTS,
    "Phi4MultimodalImageEmbedding.sub_img_feature_extensor": ELEMENTS,
    "Phi4MultimodalVisionMultiheadAttentionPoolingHead.probe": ELEMENTS,
    "RecurrentGemmaRglru.input_gate_bias": ELEMENTS,
    "RecurrentGemmaRglru.recurrent_gate_bias": ELEMENTS,
    "RwkvFeedForward.time_mix_key": ELEMENTS,
    "RwkvFeedForward.time_mix_receptance": ELEMENTS,
    "RwkvSelfAttention.time_mix_key": ELEMENTS,
    "RwkvSelfAttention.time_mix_receptance": ELEMENTS,
    "RwkvSelfAttention.time_mix_value": ELEMENTS,
    "SiglipMultiheadAttentionPoolingHead.probe": ELEMENTS,
    "XLNetModel.mask_emb": ELEMENTS,
    "XLNetRelativeAttention.r_r_bias": ELEMENTS,
    "XLNetRelativeAttention.r_s_bias": ELEMENTS,
    "XLNetRelativeAttention.r_w_bias": ELEMENTS,
    "ZambaMambaMixer.A_log": ELEMENTS,
    "ZambaMambaMixer.D": ELEMENTS,
    "ZambaMambaMixer.dt_proj_bias": ELEMENTS,
}

# What no role describes, and why; with the role that it has for lack of a better one.
EXCEPTIONS = {
    # einsum("ibh,hnd->ibnd", h, q): a matrix only as [h, n × d], inputs first
    **dict.fromkeys([f"XLNetRelativeAttention.{name}" for name in "qkvr"], LINEAR),
    # einsum("ibnd,hnd->ibh", v, o): a matrix only as [h, n × d], inputs last
    "XLNetRelativeAttention.o": LINEAR,
    # einsum("ibnd,snd->ibns", q, seg_embed): a matrix [s, d] for each n
    "XLNetRelativeAttention.seg_embed": ELEMENTS,
    # A convolution over several channels: a matrix only as [outputs, inputs × window]
    "Conv1d.weight": ELEMENTS,
    "Conv2d.weight": ELEMENTS,
}


def build(label: str) -> Any:
    """Return a model of real size on the device "meta", where it takes no memory."""
    model_type = label.partition(" with")[0]
    changes = VARIANTS.get(label, SETTINGS.get(model_type, {}))
    auto: Any = AutoModelForCausalLM
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        config = CONFIG_MAPPING[model_type](**deepcopy(changes))
        with torch.device("meta"):
            if model_type.startswith("musicgen"):  # whose language model is one of three parts
                return kinds[type(config)](config.decoder)
            return auto.from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        pytest.skip(f"transformers {transformers.__version__} cannot build {label}: {reason}")


@cache
def _product(kind: type, parameter: str) -> Role | None:
    """Return the role of a parameter that its class multiplies in one of the usual ways."""
    code = inspect.getsource(kind)
    weight = rf"self\.{parameter}\b(\[\w+\])?(?!\[|\.T\b|\.t\(|\.transpose)"
    if re.search(rf"linear\(.*, {weight}", code):
        return LINEAR
    return TRANSPOSED if re.search(rf"(\w @ |mm\(.*, |matmul\(.*, ){weight}", code) else None


def truth(module: nn.Module, parameter: str, shape: torch.Size) -> tuple[str, Role]:
    """Return the kind of a parameter, and the role that it has by the code of its module."""
    kinds = (kind for kind in (*OF_TORCH, nn.Conv1d, nn.Conv2d) if isinstance(module, kind))
    kind = next(kinds, type(module))
    name = f"{kind.__name__}.{parameter}"
    if len(shape) < 2:
        return "vectors", ELEMENTS
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and shape[1] == 1:
        return f"{name}, depthwise", ELEMENTS
    role = (RAW | EXCEPTIONS).get(name) or OF_TORCH.get(kind) or _product(kind, parameter)
    assert role, f"Read what {kind} does with {parameter}, and add it to RAW."
    if len(shape) == 3 and hasattr(module, "is_transposed"):  # what transformers' kernels go by
        assert role == (TRANSPOSED if module.is_transposed else LINEAR)
    return name, role


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield each parameter once, also if it is tied."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{name}".removeprefix("."), module, parameter


def stained(role: Role, shape: torch.Size) -> Tensor:
    """Return a tensor that shows its role: values vary along the axis of the inputs only.

    It is expanded, so it takes as much memory as that axis. Of a stack, it has one matrix.
    """
    if role in (ROWS, ELEMENTS):
        return torch.tensor(-1 if role == ROWS else 0, dtype=torch.int8).expand(shape)
    inputs = torch.arange(shape[-1 if role == LINEAR else -2]).remainder(100).add(1).char()
    sizes = (*(1 for _ in shape[:-2]), *shape[-2:])
    return (inputs if role == LINEAR else inputs[:, None]).expand(sizes)


def shown(tensor: Tensor) -> Role:
    """Return the role that a stained tensor shows."""
    first = tensor[(0,) * tensor.dim()]
    if first <= 0:
        return ROWS if first else ELEMENTS
    row, column = tensor[(0,) * (tensor.dim() - 1)], tensor[(0,) * (tensor.dim() - 2)][:, 0]
    assert bool((row != first).any()) != bool((column != first).any())
    return LINEAR if (row != first).any() else TRANSPOSED


def roles(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Role]:
    return {name: role_of(name, shape, shapes.get) for name, shape in shapes.items()}


@pytest.mark.parametrize("label", [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])
def test_an_architecture_has_the_roles_that_its_code_gives_them(label: str) -> None:
    model = build(label)
    shapes, kinds, stains = {}, {}, {}
    layers = set()
    for name, module, parameter in parameters(model):
        shapes[name] = tuple(parameter.shape)
        kinds[name] = truth(module, name.rpartition(".")[2], parameter.shape)
        # Of all layers with the same shapes, one is enough.
        layer = (re.sub(r"\.\d+\.", ".0.", name), parameter.shape)
        if layer not in layers:
            layers.add(layer)
            stains[name] = stained(kinds[name][1], parameter.shape)

    found = roles(shapes)
    table = {
        kind: {found[name].name for name in kinds if kinds[name][0] == kind}
        for kind, _ in kinds.values()
    }
    print("\n".join(f"{kind}: {', '.join(names)}" for kind, names in sorted(table.items())))
    assert table == {kind: {role.name} for kind, role in kinds.values()}

    prefix = f"{model.base_model_prefix}."
    bare = roles({name.removeprefix(prefix): shape for name, shape in shapes.items()})
    assert bare == {name.removeprefix(prefix): role for name, role in found.items()}

    on_disk = revert_weight_conversion(model, stains)  # as save_pretrained writes them
    assert roles({name: tuple(tensor.shape) for name, tensor in on_disk.items()}) == {
        name: shown(tensor) for name, tensor in on_disk.items()
    }


def shape_of_none(name: str) -> None:
    raise AssertionError(f"{name} is not needed")


GPT2 = {
    "attn.c_attn.weight": (64, 192),
    "attn.c_attn.bias": (192,),
    "attn.c_proj.weight": (64, 64),
    "attn.c_proj.bias": (64,),
    "crossattention.c_attn.weight": (64, 128),
    "crossattention.c_attn.bias": (128,),
    "crossattention.q_attn.weight": (64, 64),
    "crossattention.q_attn.bias": (64,),
    "mlp.c_fc.weight": (64, 256),
    "mlp.c_fc.bias": (256,),
    "mlp.c_proj.weight": (256, 64),
    "mlp.c_proj.bias": (64,),
}


@pytest.mark.parametrize("prefix", ["", "h.0.", "transformer.h.0.", "model.decoder.layers.11."])
def test_gpt2_and_gpt_bigcode_share_names_and_differ_in_shapes(prefix: str) -> None:
    gpt2 = {prefix + name: shape for name, shape in GPT2.items()}
    big_code = {name: shape[::-1] for name, shape in gpt2.items()}
    for shapes, role in ((gpt2, TRANSPOSED), (big_code, LINEAR)):
        assert roles(shapes) == {
            name: role if len(shape) == 2 else ELEMENTS for name, shape in shapes.items()
        }


@pytest.mark.parametrize(
    ("heads", "role"),
    [({"attn.c_attn.weight": (80, 64), "attn.c_attn.bias": (80,)}, LINEAR), ({}, LINEAR)],
)
def test_one_key_head_of_gpt_bigcode_and_a_square_matrix_alone(heads: Any, role: Role) -> None:
    assert role_of("attn.c_proj.weight", (64, 64), heads.get) == role


def test_a_layer_that_shares_a_name_with_gpt2_and_has_no_bias_is_linear() -> None:
    qwen = {"h.0.attn.c_attn.weight": (192, 64), "h.0.attn.c_attn.bias": (192,)}
    for name, shape in {"attn.c_proj": (64, 64), "mlp.c_proj": (64, 172)}.items():
        assert role_of(f"h.0.{name}.weight", shape, qwen.get) == LINEAR


@pytest.mark.parametrize(
    "prefix", ["", "model.layers.0.mlp.experts.", "layers.3.feed_forward.experts."]
)
@pytest.mark.parametrize(
    ("gate_up", "down"), [("gate_up_proj", "down_proj"), ("fc1.weight", "fc2.weight")]
)
def test_fused_experts_are_told_apart_whatever_their_sizes(
    prefix: str, gate_up: str, down: str
) -> None:
    for d in range(1, 9):
        for f in range(1, 9):
            qwen = {prefix + gate_up: (4, 2 * f, d), prefix + down: (4, d, f)}
            gpt_oss = {prefix + gate_up: (4, d, 2 * f), prefix + down: (4, f, d)}
            assert set(roles(qwen).values()) == {LINEAR}
            assert set(roles(gpt_oss).values()) == {TRANSPOSED}


@pytest.mark.parametrize("name", ["gate_up_proj", "up_proj", "down_proj"])
def test_experts_alone_or_without_a_gate_are_linear(name: str) -> None:
    assert roles({f"experts.{name}": (4, 64, 32)}) == {f"experts.{name}": LINEAR}


@pytest.mark.parametrize("name", [None, "", "some.new.thing", "some.new.thing.weight"])
def test_an_unknown_name(name: str | None) -> None:
    for shape, role in {
        (): ELEMENTS,
        (8,): ELEMENTS,
        (8, 4): LINEAR,
        (1, 8): LINEAR,  # a layer with one output, such as Qwen's gate of the shared expert
        (2, 8, 4): LINEAR,
        (2, 2, 8, 4): LINEAR,
        (1, 1, 8): ELEMENTS,
        (8, 1, 4): ELEMENTS,
        (1, 8, 1): ELEMENTS,
    }.items():
        assert role_of(name, shape, shape_of_none) == role


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("lm_head.weight", (1000, 64), LINEAR),
        ("embed_out.weight", (1000, 64), LINEAR),
        ("model.llm.unembed.weight", (1000, 64), LINEAR),
        ("score.weight", (2, 64), LINEAR),
        ("model.embed_tokens.weight", (1000, 64), ROWS),
        ("embed_tokens.weight", (1000, 64), ROWS),
        ("transformer.wpe.weight", (128, 64), ROWS),
        ("shared.weight", (1000, 64), ROWS),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), ROWS),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (128, 64), LINEAR),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 256, 64), LINEAR),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 256), ELEMENTS),
        ("model.layers.0.mlp.gate.weight", (4, 64), LINEAR),
        ("model.layers.0.conv.in_proj.weight", (192, 64), LINEAR),
        ("blocks.0.attention.time_mix_key", (1, 1, 64), ELEMENTS),
        ("backbone.layers.0.mixer.A_log", (128, 16), ELEMENTS),
        ("visual.patch_embed.proj.weight", (64, 3, 2, 14, 14), ELEMENTS),
        ("vision_tower.embeddings.patch_embedding.weight", (64, 588), LINEAR),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), LINEAR),
    ],
)
def test_no_sibling_is_asked_for_where_the_name_and_shape_decide(
    name: str, shape: tuple[int, ...], role: Role
) -> None:
    assert role_of(name, shape, shape_of_none) == role


@pytest.mark.parametrize(
    ("name", "shape", "asked"),
    [
        ("h.0.mlp.c_fc.weight", (64, 256), ["h.0.mlp.c_fc.bias"]),
        ("h.0.attn.c_proj.weight", (64, 64), ["h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"]),
        ("experts.gate_up_proj", (4, 64, 256), ["experts.down_proj"]),
        ("experts.down_proj", (4, 128, 64), ["experts.gate_up_proj"]),
    ],
)
def test_siblings_are_asked_for_where_they_decide(
    name: str, shape: tuple[int, ...], asked: list[str]
) -> None:
    known = {f"h.0.{name}": shape for name, shape in GPT2.items()}
    calls = []

    def shape_of(other: str) -> tuple[int, ...] | None:
        calls.append(other)
        return known.get(other)

    role_of(name, shape, shape_of)
    assert calls == asked
