"""The experts: a base, trained further on one task each."""

import functools
import math
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from zlib import crc32

import torch
import transformers
from torch import Tensor

from benchmarks.fitting import IGNORED, fit
from benchmarks.harness_tasks import Example
from benchmarks.language_model.base import fast_products, load
from benchmarks.language_model.tasks import stream
from benchmarks.language_model.whole import written_whole

_BATCH = 12
_RANK = 16  # of a LoRA adapter
_COLUMNS = 4  # bfloat16 products of an odd number of rows take up to half as long again


@dataclass(frozen=True)
class Recipe:
    """How the experts of a family are made.

    Attributes:
        rate: the peak learning rate.
        other_rates: the tasks that have another one.
        steps: how many batches an expert is trained on.
        adapter: train a LoRA adapter of all linear layers, not the whole model.
        own_starts: adapters start from different random matrices, not from the same.
        stored: an adapter is merged into a base of this dtype, and stored so, before it is an
            expert; None leaves it an adapter.
        tasks: the tasks that have an expert; None for all.
    """

    rate: float
    other_rates: dict[str, float] = field(default_factory=dict)
    steps: int = 36
    adapter: bool = False
    own_starts: bool = False
    stored: torch.dtype | None = None
    tasks: tuple[str, ...] | None = None

    def trained_like(self, task: str, seed: int) -> str:
        """Return a name that experts of this task share if they are trained in the same way."""
        kind = ("own-start-" * self.own_starts + "adapter") if self.adapter else "full"
        return f"{kind}-{self.rate_of(task):g}-{self.steps}-{seed}"

    def rate_of(self, task: str) -> float:
        """Return the peak learning rate of a task's expert."""
        return self.other_rates.get(task, self.rate)

    def start(self, task: str, seed: int) -> int:
        """Return the seed of an adapter's random start."""
        return crc32(f"{task}/{seed}".encode()) if self.own_starts else seed


_LORA = Recipe(5e-4, adapter=True)
# Even: one learning rate. Uneven: an expert with little to learn takes large steps.
RECIPES = {
    "even": Recipe(5e-5),
    "even, 3 experts": Recipe(5e-5, tasks=("film", "category", "arithmetic")),
    "even, 2 experts": Recipe(5e-5, tasks=("section", "speech")),
    "uneven": Recipe(5e-5, {"speech": 4e-4}),
    "long": Recipe(2e-4, steps=300, tasks=("category", "section", "speech")),
    "LoRA": _LORA,
    "LoRA, merged": replace(_LORA, stored=torch.float32),
    "LoRA, merged, bfloat16": replace(_LORA, stored=torch.bfloat16),
    "LoRA, own starts": replace(_LORA, own_starts=True),
}


def train_expert(
    base: Path, examples: list[Example], recipe: Recipe, task: str, seed: int, out: Path
) -> None:
    """Train an expert and write it in float32.

    Args:
        base: the directory of the base.
        examples: the training examples of the expert's task.
        recipe: how it is trained.
        task: its task.
        seed: decides which examples are seen in which order, and how an adapter starts.
        out: the directory of the expert.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    torch.manual_seed(recipe.start(task, seed))
    model = _with_adapter(load(base)) if recipe.adapter else load(base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    drawn = stream(examples, seed)
    batches = (
        encoded(tokenizer, list(islice(drawn, _BATCH)), model.device) for _ in range(recipe.steps)
    )
    precision = functools.partial(fast_products, model.device.type)
    fit(model, batches, recipe.steps, recipe.rate_of(task), precision)
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
) -> dict[str, Tensor]:
    """Return what a causal model takes, and labels for the answers only.

    The tokens are those that lm-eval makes of a prompt and its answer. Padding is on the left, so
    that all answers end in the last column, and few columns need logits.
    """
    lines = [tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in examples]
    answers = [
        len(line) - len(tokenizer(example.prompt)["input_ids"])
        for line, example in zip(lines, examples, strict=True)
    ]
    columns = math.ceil(max(map(len, lines)) / _COLUMNS) * _COLUMNS
    ids = torch.zeros(len(lines), columns, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        ids[row, -len(line) :] = torch.tensor(line)
        mask[row, -len(line) :] = 1
        labels[row, -answer:] = ids[row, -answer:]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    return {name: tensor.to(device) for name, tensor in inputs.items()}
