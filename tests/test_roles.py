"""The roles of tensors, by the code of the language models that transformers can build.

Every kind of model with tensors of its own is built, and a fifth of the others; with ``--fuzz 1``,
all are.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from itertools import product
from typing import Any
from unittest import mock
from zlib import crc32

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
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 2048, "compress_ratio": 16}
_INDEXER = {f"indexer_{name}": value for name, value in _INDEXER.items()}
_MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}
_ASSISTANT = {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 2}
_N_GRAMS = {"ngram_vocab_size_base": 64, "split_ngram_parts": 2, "ple_layer_ids": [1]}
# Architectures whose default config builds no model.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
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
    "gemma4_text with experts": {**_MOE, "moe_intermediate_size": 704},
    "gpt_oss with wide experts": {"intermediate_size": 5760},
    "mixtral with square experts": {"intermediate_size": 4096},
    "nemotron_h with all layers": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "qwen4_exp_text with n-grams": {**_INDEXER, **_N_GRAMS, "eos_token_id": 1},
}

OF_TORCH: dict[type[nn.Module], Role] = {
    nn.Linear: LINEAR,
    Conv1D: TRANSPOSED,
    nn.Embedding: ROWS,
}
# Parameters that are added to something, or multiplied element by element; those of a ParameterList
# are Reformer's positions along two axes.
BY_ELEMENT = re.compile(
    r".*(bias|A_log|\.D|\.time_mix_\w+|\.probe|\.mask_emb|\.pos_embed|_extensor|\.r_[rsw]_bias|"
    r"GluPointWiseConv\.b[12]|ShortConvolution\.static_weight|L2Clip\.scale|ParameterList\.[01])"
)
KINDS_WITH_THEM = """deepseekv4 ernie45moe falconmamba gotocr2 gptoss inkling2 jamba kimilinear
    mamba phi4multimodal recurrentgemma reformer rwkv zamba"""
# What the modelling code does with the others, unless _product reads it there.
RAW: dict[str, Role] = {
    "AriaGroupedExpertsGemm.weight": TRANSPOSED,  # matmul(tokens, expert_weights[expert])
    # F.embedding(bucket, relative_attention_bias)
    "CpmAntSegmentPositionEmbedding.relative_attention_bias": ROWS,
    "DbrxExpertGLU.w1": LINEAR,  # x.matmul(w1.T), as with v1
    "DbrxExpertGLU.v1": LINEAR,
    "DbrxExpertGLU.w2": TRANSPOSED,  # h.matmul(w2)
    "GotOcr2VisionAttention.rel_pos_h": LINEAR,  # einsum("bhwc,hkc->bhwk", query, rel_pos_h[...])
    "GotOcr2VisionAttention.rel_pos_w": LINEAR,
    # scaled_dot_product_attention(query, states, states): scores of the states for a few queries
    "Inkling2BlockAttentionResidual.query": LINEAR,
    "InklingSharedExperts.gate_proj": LINEAR,  # bmm(hidden_states, gate_proj.transpose(1, 2))
    "InklingSharedExperts.up_proj": LINEAR,
    "InklingSharedExperts.down_proj": LINEAR,
    "MultiheadAttention.in_proj_weight": LINEAR,  # the weights of three linear layers
    "ZambaMambaMixer.x_proj_weight": LINEAR,  # x_proj_weight[:, None] @ hidden_states
    "ZambaMambaMixer.dt_proj_weight": LINEAR,
    # What no role describes has one for lack of a better one.
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

# Tied embeddings of models that are encoders, too. Those may have no head.
MAY_BE_BARE = re.compile(r"embeddings\.word_emb|transformer\.(w|word_embedding)\.")


def build(label: str) -> Any:
    """Return a model of real size on the device "meta", where it takes no memory."""
    model_type = label.partition(" with")[0]
    changes = VARIANTS.get(label, SETTINGS.get(model_type, {}))
    auto: Any = AutoModelForCausalLM
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        config = CONFIG_MAPPING[model_type](**deepcopy(changes))
        with torch.device("meta"), mock.patch.object(nn.Linear, "reset_parameters"):
            if model_type.startswith("musicgen"):  # whose language model is one of three parts
                return kinds[type(config)](config.decoder)
            return auto.from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        pytest.skip(f"transformers {transformers.__version__} cannot build {label}: {reason}")


@cache
def _classes(module: str) -> list[str]:
    return re.split(r"\n(?=class )", inspect.getsource(sys.modules[module]))


@cache
def _product(kind: type, parameter: str) -> Role | None:
    """Return the role of a parameter that its class multiplies in one of the usual ways."""
    code = next(c for c in _classes(kind.__module__) if c.startswith(f"class {kind.__name__}("))
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
    role = RAW.get(name) or OF_TORCH.get(kind) or _product(kind, parameter)
    role = role or (ELEMENTS if BY_ELEMENT.fullmatch(name) else None)
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "label" in metafunc.fixturenames:
        kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if not metafunc.config.getoption("--fuzz"):
            own = " ".join([*RAW, KINDS_WITH_THEM]).lower()
            kinds = [
                kind
                for kind in kinds
                if kind.removesuffix("_text").replace("_", "") in own
                or crc32(kind.encode()) % 5 == 0
            ]
        metafunc.parametrize("label", [*kinds, *VARIANTS])


def test_an_architecture_has_the_roles_that_its_code_gives_them(label):
    model = build(label)
    shapes, kinds, stains = {}, {}, {}
    layers = set()
    heads = {module.weight for module in model.modules() if type(module) is nn.Linear}
    for name, module, parameter in parameters(model):
        shapes[name] = tuple(parameter.shape)
        kinds[name] = truth(module, name.rpartition(".")[2], parameter.shape)
        if parameter in heads and isinstance(module, nn.Embedding) and not MAY_BE_BARE.search(name):
            kinds[name] = "tied embeddings", LINEAR
        # Of all layers with the same shapes, one is enough.
        layer = (re.sub(r"\.\d+\.", ".0.", name), parameter.shape)
        if layer not in layers:
            layers.add(layer)
            stains[name] = stained(kinds[name][1], parameter.shape)

    found = roles(shapes)
    table: dict[str, set[Role]] = {}
    for name, (kind, _) in kinds.items():
        table.setdefault(kind, set()).add(found[name])
    assert table == {kind: {role} for kind, role in kinds.values()}

    prefix = f"{model.base_model_prefix}."
    bare = roles({name.removeprefix(prefix): shape for name, shape in shapes.items()})
    assert bare == {name.removeprefix(prefix): role for name, role in found.items()}

    on_disk = revert_weight_conversion(model, stains)  # as save_pretrained writes them
    assert roles({name: tuple(tensor.shape) for name, tensor in on_disk.items()}) == {
        name: shown(tensor) for name, tensor in on_disk.items()
    }


@pytest.mark.parametrize("prefix", ["", "layers.0.mlp.experts.", "layers.3.feed_forward.experts."])
@pytest.mark.parametrize(
    ("gate_up", "down"), [("gate_up_proj", "down_proj"), ("fc1.weight", "fc2.weight")]
)
def test_fused_experts_are_told_apart_whatever_their_sizes(prefix, gate_up, down):
    for d, f in product(range(1, 9), range(1, 9)):
        qwen = {prefix + gate_up: (4, 2 * f, d), prefix + down: (4, d, f)}
        gpt_oss = {prefix + gate_up: (4, d, 2 * f), prefix + down: (4, f, d)}
        assert set(roles(qwen).values()) == {LINEAR}
        assert set(roles(gpt_oss).values()) == {TRANSPOSED}
    for alone in (gate_up, down, "up_proj"):
        assert role_of(prefix + alone, (4, 64, 32), {}.get) == LINEAR


@pytest.mark.parametrize("name", [None, "", "some.new.thing", "some.new.thing.weight"])
def test_an_unknown_name(name):
    # With one output, it is a layer such as Qwen's gate of the shared expert.
    for shape in [(8, 4), (1, 8), (2, 8, 4), (2, 2, 8, 4)]:
        assert role_of(name, shape, {}.get) == LINEAR
    for shape in [(), (8,), (1, 1, 8), (8, 1, 4), (1, 8, 1)]:
        assert role_of(name, shape, {}.get) == ELEMENTS


@pytest.mark.parametrize(
    ("name", "shape", "role", "beside"),
    [
        ("model.llm.unembed.weight", (1000, 64), LINEAR, {}),
        ("score.weight", (2, 64), LINEAR, {}),
        ("vision_tower.embeddings.patch_embedding.weight", (64, 588), LINEAR, {}),
        ("visual.patch_embed.proj.weight", (64, 3, 2, 14, 14), ELEMENTS, {}),
        ("shared.weight", (1000, 64), ROWS, {}),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), ROWS, {}),
        # A name that GPT-2 has, too, is of a linear layer if no bias shows otherwise.
        ("attn.c_proj.weight", (64, 64), LINEAR, {}),
        ("attn.c_proj.weight", (64, 64), LINEAR, {"weight": (80, 64), "bias": (80,)}),
        ("mlp.c_proj.weight", (64, 172), LINEAR, {"weight": (192, 64), "bias": (192,)}),
    ],
)
def test_names_of_other_models(name, shape, role, beside):
    known = {f"attn.c_attn.{part}": its for part, its in beside.items()}
    assert role_of(name, shape, known.get) == role
