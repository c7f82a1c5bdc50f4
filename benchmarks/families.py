"""Checkpoints to time merges with: a Llama of a given size, and experts that are it and noise."""

import math
from pathlib import Path

import torch
import transformers

_LAYERS = 20
_NOISE = 0.01


def make_family(
    directory: Path,
    parameters: int,
    experts: int,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "500MB",
) -> list[Path]:
    """Write a base and experts with transformers.

    Args:
        directory: where to write them; one directory each.
        parameters: of each model, about; the largest tensor holds a tenth of them.
        experts: how many experts.
        dtype: what they are stored in.
        shard_size: of their safetensors files, as transformers writes sizes.

    Returns:
        The paths, the base's first.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    width = max(64, round(math.sqrt(parameters / 324) / 64) * 64)  # it has 324 width² parameters
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        vocab_size=32 * width,
        num_hidden_layers=_LAYERS,
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
