"""Checkpoints to time merges with: a Llama of a given size, and experts that are it and noise."""

import math
from pathlib import Path

import torch
import transformers

_NOISE = 0.01


def make_family(
    directory: Path,
    parameters: int,
    experts: int,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "500MB",
    layers: int = 20,
) -> list[Path]:
    """Write a base and experts with transformers.

    Args:
        directory: where to write them; one directory each.
        parameters: of each model, about; with 20 layers a tenth of them is in one tensor.
        experts: how many experts.
        dtype: what they are stored in.
        shard_size: of their safetensors files, as transformers writes sizes.
        layers: decoder layers.

    Returns:
        The paths, the base's first.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # It has (64 + 13 layers) width² parameters, 64 of them in the two vocabulary tensors.
    width = max(64, round(math.sqrt(parameters / (64 + 13 * layers)) / 64) * 64)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        vocab_size=32 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = [directory / name for name in ("base", *(f"expert-{n}" for n in range(1, experts + 1)))]
    for number, path in enumerate(paths):
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape).mul_(_NOISE * number)  # task vectors of other lengths
            tensor.copy_(base[name] + noise)
        model.save_pretrained(path, max_shard_size=shard_size)
    return paths
