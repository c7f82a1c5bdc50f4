"""The experts: a base, trained further on one task each."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.fitting import IGNORED, fit
from benchmarks.harness_tasks import Example
from benchmarks.language_model.base import fast_products, load
from benchmarks.language_model.tasks import stream
from benchmarks.language_model.whole import written_whole

_STEPS = 36
_BATCH = 12
_RANK = 16  # of a LoRA adapter


@dataclass(frozen=True)
class Recipe:
    """How the experts of a family are trained.

    Attributes:
        rate: the peak learning rate.
        other_rates: the tasks that have another one.
        adapter: train a LoRA adapter of all linear layers, not the whole model.
    """

    rate: float
    other_rates: dict[str, float]
    adapter: bool = False


# Even: one learning rate. Uneven: an expert with little to learn takes large steps.
RECIPES = {
    "even": Recipe(5e-5, {}),
    "uneven": Recipe(5e-5, {"speech": 4e-4}),
    "LoRA": Recipe(5e-4, {}, adapter=True),
}


def train_expert(
    base: Path, examples: list[Example], adapter: bool, rate: float, seed: int, out: Path
) -> None:
    """Train an expert and write it in float32.

    Args:
        base: the directory of the base.
        examples: the training examples of the expert's task.
        adapter: train a LoRA adapter of all linear layers, not the whole model.
        rate: the peak learning rate.
        seed: decides which examples are seen in which order, and how an adapter starts.
        out: the directory of the expert.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    model = _with_adapter(load(base)) if adapter else load(base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    drawn = stream(examples, seed)
    batches = (encoded(tokenizer, list(islice(drawn, _BATCH)), model.device) for _ in range(_STEPS))
    with fast_products():
        fit(model, batches, _STEPS, rate)
    with written_whole(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _with_adapter(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return the model with a new LoRA adapter; the rest is not trained. Needs peft."""
    import peft

    config = peft.LoraConfig(
        r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)  # type: ignore[return-value]


def encoded(
    tokenizer: transformers.PreTrainedTokenizerBase, examples: list[Example], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids, and labels for the answers only; both of shape [examples, tokens].

    The tokens are those that lm-eval makes of a prompt and its answer. Padding is on the right,
    where causal attention never sees it.
    """
    prompts = [len(tokenizer(example.prompt)["input_ids"]) for example in examples]
    lines = [tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in examples]
    longest = max(map(len, lines))
    ids = torch.zeros(len(lines), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (line, start) in enumerate(zip(lines, prompts, strict=True)):
        ids[row, : len(line)] = torch.tensor(line)
        labels[row, start : len(line)] = ids[row, start : len(line)]
    return ids.to(device), labels.to(device)
