"""Property 5 on the user's own models: how linear outputs are between base and expert."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.vocabularies import load_tokenizer, tokenizers_agree

ALPHAS = tuple(step / 10 for step in range(11))
_TOKENS = 16  # for each prompt: those that base and expert find most likely
# Smaller movements, relative to the size of the outputs, show rounding, not a task vector.
_RESOLUTION = 1e-5
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# Neutral texts of several kinds: facts, stories, sums, code, questions, instructions.
BUILT_IN_PROMPTS = [
    "The capital of France is the city of Paris, which lies on the river",
    "Water boils at a lower temperature in the mountains because the air pressure",
    "She opened the letter slowly, read the first line, and began to",
    "A train leaves at nine and arrives at noon. The journey takes three",
    "If x + 3 = 10, then x is equal to",
    "def add(a, b):\n    return a",
    "Question: Which planet is closest to the sun? Answer:",
    "To make tea, heat the water, pour it over the leaves, and wait a few",
]
# Each prompt takes a forward pass for each α, and a long document takes minutes.
_MOST_PROMPTS, _MOST_TOKENS = 32, 256


@dataclass(frozen=True)
class Linearity:
    """The outputs z(α) = f(θ_0 + α (θ_t − θ_0)) of one expert."""

    outputs: Tensor  # logits in float64, of shape [11 values of α, P prompts, tokens]
    held: Sequence[str] = ()  # parameters that could not be compared and keep the base's values

    @property
    def movement(self) -> float:
        """The root mean square of z(1) − z(0), in logits."""
        return (self.outputs[-1] - self.outputs[0]).square().mean().sqrt().item()

    @property
    def r_squared(self) -> float | None:
        """R² of straight lines: 1 − Σ (z − line)² / Σ (z − mean of z over α)².

        Each sum is over all outputs and α, since the R² of an output that hardly moves is noise.
        None if they move by no more than the rounding of float32.
        """
        if self.movement <= _RESOLUTION * self.outputs.square().mean().sqrt().item():
            return None
        alphas = torch.tensor(ALPHAS, dtype=self.outputs.dtype)[:, None, None]
        line = torch.lerp(self.outputs[:1], self.outputs[-1:], alphas)
        misfit = (self.outputs - line).square().sum()
        return 1 - (misfit / (self.outputs - self.outputs.mean(dim=0)).square().sum()).item()


def measure_linearity(
    base: ModelReference, survey: Survey, prompts: Sequence[Tensor], options: MergeOptions
) -> list[Linearity]:
    """Follow the next token's logits on the line from a base to each expert of its survey.

    The model runs in float32: 16 bits would round away small steps along a task vector.

    Raises:
        ValueError: if a model has a parameter that another lacks, or if outputs overflow.
    """
    known = options.transformers_cache, options.trust_remote_code
    stored = reduce(torch.promote_types, (it.dtype for it in survey.tensors.values()))
    model = load(base, torch.float32, options).to(torch.device(options.device or "cpu"))
    start, measured = load(base, stored, options), []
    experts: tuple[Any, ...] = survey.experts
    for expert in tqdm(experts, "Running the models", unit="expert", disable=options.quiet or None):
        end = load(expert, stored, options)
        # Different shapes need no list: the models themselves show them.
        left_out = () if tokenizers_agree(base, expert, *known) else survey.left_out
        held = incomparable(start, end, left_out)
        steps = [logits(interpolated(model, start, end, alpha, held), prompts) for alpha in ALPHAS]
        tokens = (steps[0] + steps[-1]).topk(_TOKENS).indices
        outputs = torch.stack([step.gather(-1, tokens) for step in steps]).double()
        measured.append(Linearity(outputs, held))
        del end  # frees it before the next expert is loaded
    return measured


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Tensor]) -> Tensor:
    """Return the logits of the token after each of P prompts, on the CPU: [P, vocabulary]."""
    # One prompt at a time, because architectures treat padding differently.
    passes = (model(input_ids=ids[None].to(model.device), use_cache=False) for ids in prompts)
    outputs = torch.stack([done.logits[0, -1].cpu() for done in passes])
    if not outputs.isfinite().all():
        raise ValueError(
            f"The outputs of {model.name_or_path} overflow on the line to an expert; check that "
            "the base and its experts generate text."
        )
    return outputs


@torch.no_grad()
def interpolated(model: Any, base: Any, expert: Any, alpha: float, held: Sequence[str]) -> Any:
    """Set a model to θ_0 + α (θ_t − θ_0), but the parameters ``held`` to θ_0, and return it."""
    starts, ends = base.state_dict(), expert.state_dict()
    for name, parameter in model.named_parameters():
        start = starts[name].to(parameter)
        end = start if name in held else ends[name].to(parameter)
        torch.lerp(start, end, alpha, out=parameter)  # unlike the formula, exact at both ends
    return model


def incomparable(base: Any, expert: Any, left_out: Collection[str] = ()) -> list[str]:
    """Return the parameters that keep the base's values; ``left_out`` has MergeKit's names."""
    parameters, tensors = dict(base.named_parameters()), expert.state_dict()
    # A tied weight is in the parameters once, and in a state_dict under each of its names.
    own = dict(expert.named_parameters()).keys() - parameters.keys()
    if unknown := sorted(own | (parameters.keys() - tensors.keys())):
        raise ValueError(
            f"Parameter {unknown[0]} is missing from {base.name_or_path} or {expert.name_or_path}, "
            "or tied to another one there; diagnose fine-tunes of one base."
        )
    return [
        name
        for name, parameter in parameters.items()
        if parameter.shape != tensors[name].shape
        # MergeKit leaves out some prefixes: wte.weight for transformer.wte.weight.
        or any(f".{name}".endswith(f".{tensor}") for tensor in left_out)
    ]


def architecture_of(model: ModelReference, trust: bool) -> str:
    """Return a model's architecture; refuse one that yields no logits of a next token."""
    config = model.config(trust)
    architecture: str = (config.architectures or ["no architecture"])[0]
    if config.is_encoder_decoder or not architecture.endswith(_CAUSAL_SUFFIXES):
        raise ValueError(
            f"{model} is a {architecture}, which yields no logits of a next token; diagnose "
            "tests decoder-only language models."
        )
    return architecture


def load(model: ModelReference, dtype: torch.dtype, options: MergeOptions) -> Any:
    """Load a model, with its LoRA merged; its files are mapped if they are stored in ``dtype``."""
    trust = options.trust_remote_code
    path = model.merged(options.lora_merge_cache, trust, options.lora_merge_dtype).model
    auto: Any = get_auto_cls(architecture_of(model, trust))
    cached = {"revision": path.revision, "cache_dir": options.transformers_cache}
    return auto.from_pretrained(path.path, trust_remote_code=trust, dtype=dtype, **cached).eval()


def token_ids(file: Path | None, base: ModelReference, options: MergeOptions) -> list[Tensor]:
    """Return the prompts of a file, or built-in ones, as token ids, int64 of shape [L] each."""
    prompts, trust = BUILT_IN_PROMPTS, options.trust_remote_code
    if file:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8.") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{file} holds no prompts; write one prompt per line.")
    vocabulary = base.config(trust).get_text_config().vocab_size
    tokenizer = load_tokenizer(base, options.transformers_cache, trust)
    if tokenizer is None:
        raise ValueError(f"No tokenizer could be loaded for {base}; add the tokenizer files.")
    ids = (tokenizer(prompt)["input_ids"][:_MOST_TOKENS] for prompt in prompts[:_MOST_PROMPTS])
    rows = [torch.tensor(row) for row in ids if row]
    if not rows or max(row.max().item() for row in rows) >= vocabulary:
        raise ValueError(
            f"The tokenizer of {base} does not fit the model, which knows {vocabulary} tokens; "
            "download its tokenizer files again."
        )
    return rows
