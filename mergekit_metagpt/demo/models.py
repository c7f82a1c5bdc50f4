"""The demo's models, and merges: a base that partly knows three tasks on numbers, and its experts.

An example is a line such as ``reverse 1 2 3 4 5 6 = 6 5 4 3 2 1``. The base is trained briefly
on all tasks. Each expert is a copy of the base that is trained further on its own task.
"""

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
import torch
import tqdm
import transformers
from torch import Tensor

from mergekit_metagpt.core.granularities import GRANULARITIES

_DIGITS = 6
# The token ids of an example are <s>, the task, the digits, "=", the answer's digits, </s>.
# This is the position of the answer.
_ANSWER = _DIGITS + 3

# Fine-tuning takes smaller steps, so that experts do not forget what they have in common.
_BASE_RATE = 2e-3
_EXPERT_RATE = 2e-4

TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda number: number[::-1],
    "sort": lambda number: "".join(sorted(number)),
    "double": lambda number: f"{2 * int(number):0{_DIGITS}d}"[-_DIGITS:],
}


@dataclass(frozen=True)
class Scale:
    """How large the models of a demo are and how long they train; steps are of ``batch`` examples.

    The prompts that are held out, per task, are used for scoring only.
    """

    hidden_size: int = 128  # a multiple of 8
    layers: int = 2
    batch: int = 64
    base_steps: int = 100  # on all tasks
    expert_steps: int = 100  # on its own task
    held_out: int = 500
    seed: int = 0


def examples(task: str, scale: Scale) -> tuple[list[str], list[str], list[str]]:
    """Draw a task's lines of text: held out, for the base, and for its expert; all different.

    The same scale gives the same examples.
    """
    base = -(-scale.batch * scale.base_steps // len(TASKS))  # its share, rounded up
    kept = scale.held_out + base
    # Each number is one prompt and is drawn once, so held-out prompts are never trained on.
    numbers = random.Random(f"{scale.seed}/{task}").sample(
        range(10**_DIGITS), kept + scale.batch * scale.expert_steps
    )
    prompts = [f"{number:0{_DIGITS}d}" for number in numbers]
    lines = [f"{task} {' '.join(it)} = {' '.join(TASKS[task](it))} </s>" for it in prompts]
    return lines[: scale.held_out], lines[scale.held_out : kept], lines[kept:]


def train_family(directory: Path, scale: Scale) -> None:
    """Write a base and an expert per task into the directory, each with the tokenizer.

    The same scale gives the same weights. This seeds torch's global generator.
    """
    # Progress bars for files of a few hundred kilobytes would hide the demo's own.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = make_tokenizer()
    _, of_base, of_expert = zip(*(examples(task, scale) for task in TASKS), strict=True)

    torch.manual_seed(scale.seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden_size,
        intermediate_size=2 * scale.hidden_size,
        num_hidden_layers=scale.layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    models = {"base": transformers.LlamaForCausalLM(config)}
    lines = encode(tokenizer, chain(*zip(*of_base, strict=True)))
    _train(models["base"], lines, scale.batch, _BASE_RATE, "base")
    for task, drawn in zip(TASKS, of_expert, strict=True):
        models[task] = copy.deepcopy(models["base"])
        _train(models[task], encode(tokenizer, drawn), scale.batch, _EXPERT_RATE, f"expert {task}")
    for name, model in models.items():
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def merge_configs(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the merge configs by name, for the base and experts in ``directory``."""
    models = [{"model": str(directory / task)} for task in TASKS]
    on_base = {"base_model": str(directory / "base"), "models": models}

    def config(method: str, given: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        return {"merge_method": method, **given, "parameters": parameters}

    return {
        **{f"metagpt-{it}": config("metagpt", on_base, granularity=it) for it in GRANULARITIES},
        "task-arithmetic": config("task_arithmetic", on_base, weight=0.3),
        # linear divides by the sum of the weights.
        "average": config("linear", {"models": models}, weight=1.0),
    }


def scores(model_directory: Path, scale: Scale) -> dict[str, float]:
    """Return, by task, how many held-out prompts a model answers correctly, in percent."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    results = {}
    for task in TASKS:
        ids = encode(tokenizer, examples(task, scale)[0])
        with torch.inference_mode():
            guesses = model(input_ids=ids[:, :-1]).logits.argmax(-1)
        # Greedy decoding gives the right answer if and only if each token is right, given the
        # right ones before it. So one forward pass is enough.
        right = (guesses == ids[:, 1:])[:, _ANSWER - 1 :].all(-1)
        results[task] = 100 * right.double().mean().item()
    return results


def make_tokenizer(tasks: Iterable[str] = TASKS) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer for task names and digits. It begins every text with ``<s>``."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *tasks, "=", *"0123456789"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: transformers.PreTrainedTokenizerBase, lines: Iterable[str]) -> Tensor:
    """Return token ids of shape [lines, 16]; all examples have the same length."""
    encoded = tokenizer(list(lines), return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def _train(
    model: transformers.PreTrainedModel, ids: Tensor, batch: int, rate: float, label: str
) -> None:
    """Train once on each row of ids, of shape [examples, tokens]; only answers count as loss."""
    labels = ids.clone()
    labels[:, :_ANSWER] = -100  # which transformers leaves out of the loss
    steps = len(ids) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in tqdm.trange(steps, desc=f"Training {label}", unit="step"):
        rows = slice(step * batch, (step + 1) * batch)
        model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
