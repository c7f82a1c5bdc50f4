"""The models to merge: a base that partly knows all tasks, and an expert for each task."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.fitting import IGNORED, fit
from benchmarks.harness_tasks import Example
from benchmarks.quality.tasks import TASKS, training
from mergekit_metagpt.demo.models import make_tokenizer


@dataclass(frozen=True)
class Size:
    """How large the models are and how long they train.

    Attributes:
        hidden_size: width; a multiple of 8.
        layers: number of decoder layers.
        base_steps: training steps of the base, on all tasks.
        base_rate: peak learning rate of the base.
        expert_steps: training steps of each expert, on its own task.
        batch: examples per step; a multiple of the number of tasks.
        held_out: validation examples per task, and also the number of test examples.
    """

    hidden_size: int
    layers: int
    base_steps: int
    base_rate: float
    expert_steps: int
    batch: int = 64
    held_out: int = 128


class Trainer:
    """Trains the models of one size and seed. A machine gives the same models each time."""

    def __init__(self, size: Size, seed: int, device: str) -> None:
        self.size, self.seed, self.device = size, seed, torch.device(device)
        self.tokenizer = make_tokenizer(TASKS)

    def base(self) -> transformers.PreTrainedModel:
        """Train a new model on all tasks in equal shares."""
        torch.manual_seed(self.seed)
        model = transformers.LlamaForCausalLM(self._config())
        mixture = zip(*(self._examples(task, "base") for task in TASKS), strict=True)
        self._train(model, chain.from_iterable(mixture), self.size.base_steps, self.size.base_rate)
        return model

    def expert(
        self, base: transformers.PreTrainedModel, task: str, rate: float
    ) -> transformers.PreTrainedModel:
        """Train a copy of the base further on one task, with a peak learning rate."""
        model = copy.deepcopy(base)
        self._train(model, self._examples(task, "expert"), self.size.expert_steps, rate)
        return model

    def save(self, model: transformers.PreTrainedModel, directory: Path) -> None:
        """Write a checkpoint with its tokenizer."""
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _examples(self, task: str, model: str) -> Iterator[Example]:
        return training(task, self.seed, model, self.size.held_out)

    def _train(
        self,
        model: transformers.PreTrainedModel,
        examples: Iterator[Example],
        steps: int,
        rate: float,
    ) -> None:
        model.to(self.device)  # type: ignore[arg-type]  # transformers wraps it
        batches = (self._encode(islice(examples, self.size.batch)) for _ in range(steps))
        fit(model, batches, steps, rate)

    def _encode(self, examples: Iterable[Example]) -> dict[str, Tensor]:
        """Return token ids, and labels for the answers only; both of shape [examples, tokens]."""
        lines = [" ".join(example) for example in examples]
        ids = self.tokenizer(lines, padding=True, return_tensors="pt")["input_ids"].to(self.device)
        is_equals = ids == self.tokenizer.convert_tokens_to_ids("=")
        is_answer = is_equals.cumsum(1).bool() & ~is_equals & (ids != self.tokenizer.pad_token_id)
        return {"input_ids": ids, "labels": ids.where(is_answer, IGNORED)}

    def _config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.size.hidden_size,
            intermediate_size=2 * self.size.hidden_size,
            num_hidden_layers=self.size.layers,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
