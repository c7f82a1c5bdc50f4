"""Merge the experts of a family with every method, and score the merges."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import click
import torch
import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from benchmarks.harness import Metrics
from benchmarks.language_model.bench import NEUTRAL, Bench
from benchmarks.language_model.by_rule import Moved, merge_by_rule, task_vectors
from benchmarks.language_model.experts import RECIPES
from benchmarks.language_model.rows import GRID, Row
from benchmarks.language_model.rules import RULES
from benchmarks.quality.families import Family, Score, expert_name
from benchmarks.stock_merge import merge
from mergekit_metagpt import survey


@dataclass(frozen=True)
class LanguageFamily(Family):
    """The results for one family. Experts have a score on their own task only.

    Attributes:
        perplexity: per word of neutral text, by model.
    """

    perplexity: dict[str, float]

    def word_perplexity(self, model: str) -> float:
        """Return how a model is surprised by neutral text, per word."""
        return self.perplexity[model]


class FamilyBench:
    """Measures one family: the base, the experts of a recipe and seed, and their merges."""

    def __init__(self, bench: Bench, recipe: str, seed: int) -> None:
        self.bench, self.recipe, self.seed = bench, recipe, seed
        how = RECIPES[recipe]
        self.tasks = [task for task in bench.splits if how.tasks is None or task in how.tasks]
        self.base = bench.base_in(how.stored or torch.float32)
        self.experts = {task: bench.expert(task, how, seed) for task in self.tasks}
        # Where MergeKit keeps the adapters that it has merged into the base.
        self._adapted = str(bench.work / "adapted")
        if how.stored:
            self.experts = {
                task: ModelReference.model_validate(str(self._checkpoint(expert)))
                for task, expert in self.experts.items()
            }
        self.name = f"{recipe}-{seed}-of-{len(self.tasks)}"

    def results(self, name: str, rows: Sequence[Row]) -> LanguageFamily:
        """Score the base, the experts and the merges on the test examples.

        Args:
            name: the name of the base.
            rows: the merges.
        """
        losses = [self.validation_loss(row) for row in GRID]
        best = GRID[losses.index(min(losses))].parameters["weight"]
        metrics = {
            "base": self._base(),
            **{expert_name(task): self._expert(task) for task in self.tasks},
            **{row.name: self._merge(row.with_weight(best), "test") for row in rows},
        }
        scored = {model: it for model, it in metrics.items() if it}
        return LanguageFamily(
            size=name,
            recipe=self.recipe,
            seed=self.seed,
            parameters=_parameters(self.base),
            norms=self._norms(),
            grid={row.parameters["weight"]: loss for row, loss in zip(GRID, losses, strict=True)},
            scores={model: _scores(it, self.tasks, "test") for model, it in scored.items()},
            perplexity={model: it[NEUTRAL]["word_perplexity,none"] for model, it in scored.items()},
        )

    def validation_loss(self, row: Row) -> float:
        """Return the mean loss of a merge over the tasks, on the validation examples."""
        return _mean_loss(_scores(self._merge(row, "validation"), self.tasks, "validation"))

    def task_vectors(self) -> Iterator[Moved]:
        """Read all tensors of the base, and where the experts moved them."""
        return task_vectors(self.base, list(map(self._checkpoint, self.experts.values())))

    def _base(self) -> Metrics:
        return self.bench.kept(
            f"base-{self.base.name}-of-{'-'.join(self.tasks)}",
            "base",
            lambda: self.bench.score(self.base, _split(self.tasks, "test")),
        )

    def _expert(self, task: str) -> Metrics:
        checkpoint = self._checkpoint(self.experts[task])
        return self.bench.kept(  # families share experts
            str(checkpoint.relative_to(self.bench.work)),
            "expert",
            lambda: self.bench.score(checkpoint, _split([task], "test")),
        )

    def _merge(self, row: Row, split: str) -> Metrics:
        return self.bench.kept(
            f"{self.name}/{split}/{row.name}",
            [row.name, row.method, row.parameters],
            lambda: self._score_merge(row, split),
        )

    def _score_merge(self, row: Row, split: str) -> Metrics:
        """Return no metrics if MergeKit refuses the merge."""
        with tempfile.TemporaryDirectory(dir=self.bench.work, prefix="merged-") as folder:
            out = Path(folder) / "merged"
            try:
                self._write_merge(row, out)
            except ValueError as error:
                click.echo(f"{self.name}, {row.name}: {error}", err=True)
                return {}
            return self.bench.score(out, _split(self.tasks, split))

    def _write_merge(self, row: Row, out: Path) -> None:
        """Merge, by MergeKit or by a rule.

        Raises:
            ValueError: if MergeKit refuses.
        """
        device = self.bench.device
        if row.method in RULES:
            merge_by_rule(RULES[row.method], self.task_vectors(), self.base, out, device)
            return
        merge(
            (row.method, row.parameters),
            self.base,
            list(self.experts.values()),
            out,
            self.seed,
            device,
            *("--lora-merge-cache", self._adapted),
        )

    def _norms(self) -> dict[str, float]:
        """Return ‖τ_t‖ by task."""
        experts = [str(expert.merged(self._adapted)) for expert in self.experts.values()]
        squares = survey(str(self.base), experts, options=MergeOptions(quiet=True)).squared_norms
        return {task: math.sqrt(square) for task, square in zip(self.tasks, squares, strict=True)}

    def _checkpoint(self, expert: ModelReference) -> Path:
        """Return the directory of an expert; an adapter is merged into the base first."""
        folder = Path(expert.merged(self._adapted).model.path)
        if expert.lora:  # lm-eval needs a tokenizer, which MergeKit does not copy there
            transformers.AutoTokenizer.from_pretrained(self.base).save_pretrained(folder)
        return folder


def _split(tasks: Iterable[str], split: str) -> list[str]:
    """Return the harness tasks of a split; neutral text goes with the test examples."""
    return [*(f"{task}_{split}" for task in tasks), *([NEUTRAL] if split == "test" else [])]


def _scores(metrics: Metrics, tasks: Iterable[str], split: str) -> dict[str, Score]:
    """Return the scores on the tasks that were measured."""
    measured = {task: metrics.get(f"{task}_{split}") for task in tasks}
    return {
        task: Score(accuracy=100 * it["acc,none"], loss=math.log(it["perplexity,none"]))
        for task, it in measured.items()
        if it
    }


def _mean_loss(scores: dict[str, Score]) -> float:
    return fmean(score.loss for score in scores.values())


def _parameters(base: Path) -> int:
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):  # without memory for them
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return int(model.num_parameters())
