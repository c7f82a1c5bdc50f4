"""The work directory: the base, the experts and all scores, of which none is made twice."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from mergekit.common import ModelReference
from transformers import AutoTokenizer

from benchmarks.harness import Metrics, score
from benchmarks.harness_tasks import write_answers, write_text
from benchmarks.language_model.base import ATTENTION, fast_products, load
from benchmarks.language_model.experts import Recipe, train_expert
from benchmarks.language_model.neutral import passages
from benchmarks.language_model.tasks import Splits, splits
from benchmarks.language_model.whole import write_json, written_whole

NEUTRAL = "neutral"  # the harness task of neutral text

_BATCH = 16


@dataclass(frozen=True)
class Items:
    """How many examples of each task, and passages of neutral text, a model is scored on."""

    validation: int = 32
    test: int = 48
    neutral: int = 16


class Bench:
    """Trains and scores in a work directory.

    Args:
        work: an absolute directory with the base in ``base``.
        definitions: the tasks, as in tasks.yaml.
        items: how much a model is scored on.
    """

    def __init__(self, work: Path, definitions: Mapping[str, Any], items: Items) -> None:
        self.work, self.base, self._items = work, work / "base", items
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.splits: dict[str, Splits] = {
            task: splits(task, definition, work / "sources", items.validation, items.test)
            for task, definition in definitions.items()
        }
        self._harness = work / "harness" / "-".join(self.splits)
        for task, examples in self.splits.items():
            write_answers(self._harness, f"{task}_validation", examples.validation)
            write_answers(self._harness, f"{task}_test", examples.test)
        write_text(self._harness, NEUTRAL, passages(items.neutral))

    def base_in(self, dtype: torch.dtype) -> Path:
        """Return the base stored in a dtype."""
        if dtype == torch.float32:
            return self.base
        folder = self.base.with_name(f"base-{str(dtype).removeprefix('torch.')}")
        if not folder.exists():
            with written_whole(folder) as partial:
                load(self.base).to(dtype).save_pretrained(partial)  # type: ignore[arg-type]
                AutoTokenizer.from_pretrained(self.base).save_pretrained(partial)
        return folder

    def expert(self, task: str, recipe: Recipe, seed: int) -> ModelReference:
        """Return an expert, which is trained if it is missing."""
        out = self.work / "experts" / recipe.trained_like(task, seed) / task
        if not out.exists():
            click.echo(f"training {out.parent.name}/{task}", err=True)
            train_expert(self.base, self.splits[task].training, recipe, task, seed, out)
        base = self.base_in(recipe.stored or torch.float32)
        name = f"{base}+{out}" if recipe.adapter else str(out)
        return ModelReference.model_validate(name)

    def kept(self, name: str, settings: object, measure: Callable[[], Metrics]) -> Metrics:
        """Return metrics from the work directory; measure them if they are missing.

        Args:
            name: the path of the file, within the directory of scores.
            settings: what the metrics depend on, besides the models and the held-out examples.
            measure: measures them.
        """
        path = self.work / "scores" / f"{name}.json"
        settings = json.loads(json.dumps([settings, list(self.splits), asdict(self._items)]))
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            if kept["settings"] == settings:
                return kept["metrics"]  # type: ignore[no-any-return]
        click.echo(f"measuring {name}", err=True)
        metrics = measure()
        write_json(path, {"settings": settings, "metrics": metrics})
        return metrics

    def score(self, checkpoint: Path, tasks: Sequence[str]) -> Metrics:
        """Score a checkpoint with lm-eval on tasks named TASK_validation, TASK_test, NEUTRAL."""
        with fast_products(self.device):
            return score(
                checkpoint,
                tasks,
                self._harness,
                device=self.device,
                batch_size=_BATCH,
                attn_implementation=ATTENTION,
            )
