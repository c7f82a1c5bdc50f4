"""Checkpoints to time merges with: a Llama of a given size, and copies of it with noise."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers

_NOISE = 0.01

# One decoder layer of a real model, with a vocabulary that does not matter.
_BLOCK: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 256}
BLOCKS = {
    "a block of Llama 2 7B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, **_BLOCK
    ),
    "a block of Llama 3 70B": transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        **_BLOCK,
    ),
}


def sized(parameters: int, layers: int = 20) -> transformers.LlamaConfig:
    """Return a Llama of approximately so many parameters.

    With 20 layers, the largest tensor has a tenth of them.
    """
    # The model has (64 + 13 layers) width² parameters; the vocabulary tensors have 64 width².
    width = max(64, round(math.sqrt(parameters / (64 + 13 * layers)) / 64) * 64)
    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        vocab_size=32 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )


def make_family(
    directory: Path,
    config: transformers.LlamaConfig,
    experts: int,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "500MB",
) -> list[Path]:
    """Write a base and experts with transformers.

    Args:
        directory: where to write the models, each into its own directory.
        config: of the base.
        experts: the number of experts.
        dtype: the dtype that the models are stored in.
        shard_size: the size of the safetensors files, in the notation of transformers.

    Returns:
        The paths, with the base first.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = [directory / name for name in ("base", *(f"expert-{n}" for n in range(1, experts + 1)))]
    for number, path in enumerate(paths):
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape).mul_(_NOISE * number)  # experts get different lengths
            tensor.copy_(base[name] + noise)
        model.save_pretrained(path, max_shard_size=shard_size)
    return paths
