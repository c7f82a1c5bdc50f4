"""Run a language model at any point on the line between a base and an expert.

Only one model runs. Base and expert are read tensor by tensor. Their safetensors files are mapped
into memory, not copied, so only the running model needs memory.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions

_NEXT_TOKEN = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def language_model_config(
    model: ModelReference, trust_remote_code: bool
) -> transformers.PretrainedConfig:
    """Return a model's config.

    Raises:
        ValueError: if the model does not return the logits of a next token.
    """
    config = model.config(trust_remote_code)
    architecture = (config.architectures or ["no architecture"])[0]
    if config.is_encoder_decoder or not architecture.endswith(_NEXT_TOKEN):
        raise ValueError(
            f"{model} is a {architecture}, which yields no logits of a next token; diagnose "
            "tests decoder-only language models."
        )
    return config


def load(
    model: ModelReference,
    dtype: torch.dtype,
    options: MergeOptions,
    device: torch.device | str = "cpu",
) -> transformers.PreTrainedModel:
    """Load a model, with its LoRA merged.

    On the CPU, its files are memory-mapped if they are stored in ``dtype``.
    """
    merged = model.merged(
        options.lora_merge_cache, options.trust_remote_code, options.lora_merge_dtype
    )
    config = language_model_config(model, options.trust_remote_code)
    with _no_progress_bar():  # the caller shows one for all models
        loaded: Any = get_auto_cls((config.architectures or [""])[0]).from_pretrained(
            merged.model.path,
            revision=merged.model.revision,
            cache_dir=options.transformers_cache,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
        )
    return cast(transformers.PreTrainedModel, loaded.to(device).eval())


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def incomparable(
    base: transformers.PreTrainedModel,
    expert: transformers.PreTrainedModel,
    left_out: Collection[str] = (),
) -> tuple[str, ...]:
    """Return the names of the parameters that must keep the base's values.

    Args:
        base: θ_0.
        expert: θ_t, of the base's class.
        left_out: the tensors that a survey could not compare, by MergeKit's names.

    Raises:
        ValueError: if one model has a parameter that the other lacks or ties to another one.
    """
    parameters, tensors = dict(base.named_parameters()), expert.state_dict()
    # A tied weight is in the parameters once, and in a state_dict under each of its names.
    for missing, owner, lacking in (
        (dict(expert.named_parameters()).keys() - parameters.keys(), expert, base),
        (parameters.keys() - tensors.keys(), base, expert),
    ):
        for name in sorted(missing):
            raise ValueError(
                f"Parameter {name} of {owner.name_or_path} is missing from "
                f"{lacking.name_or_path}, or tied to another one there; diagnose fine-tunes of "
                "one base."
            )
    return tuple(
        name
        for name, parameter in parameters.items()
        if parameter.shape != tensors[name].shape
        # MergeKit leaves out some prefixes: wte.weight for transformer.wte.weight.
        or any(f".{name}".endswith(f".{tensor}") for tensor in left_out)
    )


@torch.no_grad()
def interpolate(
    model: transformers.PreTrainedModel,
    base: transformers.PreTrainedModel,
    expert: transformers.PreTrainedModel,
    alpha: float,
    held: Collection[str] = (),
) -> None:
    """Set the parameters of a model to θ_0 + α (θ_t − θ_0), in place.

    Exact at both ends: α = 0 gives θ_0 and α = 1 gives θ_t, bit for bit. Buffers do not
    change.

    Args:
        model: the model to set. Its dtype and device are used for the arithmetic.
        base: θ_0.
        expert: θ_t.
        alpha: α, in [0, 1].
        held: parameters that get the base's values instead.
    """
    starts, ends = base.state_dict(), expert.state_dict()
    for name, parameter in model.named_parameters():
        start = starts[name].to(parameter)
        if name in held:
            parameter.copy_(start)
        else:
            # Unlike the formula, lerp is exact at α = 1.
            torch.lerp(start, ends[name].to(parameter), alpha, out=parameter)
