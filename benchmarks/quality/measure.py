"""Train families, merge them with every method, and score the merges with lm-eval."""

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers
from mergekit.options import MergeOptions

from benchmarks.harness import score
from benchmarks.quality.families import Family, Score, expert_name
from benchmarks.quality.merges import BASELINES, GRID, METAGPT
from benchmarks.quality.models import Size, Trainer
from benchmarks.quality.tasks import TASKS, write_harness_tasks
from benchmarks.stock_merge import Method, merge, task_arithmetic
from mergekit_metagpt import survey

BEST_OF_GRID = "task arithmetic, best of grid"

# The experts' peak learning rates. Even: all the same, so the task decides how far an expert
# moves. Uneven: experts with much to learn take small steps, one with little to learn large ones.
RECIPES: dict[str, dict[str, float]] = {
    "even": dict.fromkeys(TASKS, 2e-4),
    "uneven": {"reverse": 2e-4, "triple": 1e-4, "recall": 1e-4, "majority": 5e-4},
}


def measure_families(
    sizes: Mapping[str, Size], seeds: int, device: str, work: Path
) -> Iterator[Family]:
    """Train, merge and score: a base for each size and seed, and its experts for each recipe.

    Args:
        sizes: the sizes of the models, by name.
        seeds: the number of seeds; the first is 0.
        device: a torch device.
        work: an absolute directory for the models, which are removed after scoring.
    """
    for name, size in sizes.items():
        for seed in range(seeds):
            trainer = Trainer(size, seed, device)
            base = trainer.base()
            for recipe in RECIPES:
                folder = work / f"{name}-{recipe}-{seed}"
                yield measure_family(name, trainer, base, recipe, folder)
                shutil.rmtree(folder)


def measure_family(
    size: str, trainer: Trainer, base: transformers.PreTrainedModel, recipe: str, folder: Path
) -> Family:
    """Train a base's experts, merge them and score all models, in an absolute directory."""
    trainer.save(base, folder / "base")
    for task, rate in RECIPES[recipe].items():
        trainer.save(trainer.expert(base, task, rate), folder / task)
    write_harness_tasks(folder / "tasks", trainer.seed, trainer.size.held_out)
    bench = _Bench(folder, trainer.seed, str(trainer.device))
    grid = bench.grid()
    return Family(
        size=size,
        recipe=recipe,
        seed=trainer.seed,
        parameters=base.num_parameters(),
        norms=bench.norms(),
        grid=grid,
        scores=bench.scores(best_of_grid=min(grid, key=lambda weight: grid[weight])),
    )


class _Bench:
    """Measures one family, in a directory with its models and tasks."""

    def __init__(self, folder: Path, seed: int, device: str) -> None:
        self.folder, self.seed, self.device = folder, seed, device

    def norms(self) -> dict[str, float]:
        """Return ‖τ_t‖ by task."""
        experts = [self.folder / task for task in TASKS]
        quiet = MergeOptions(quiet=True)
        found = survey(str(self.folder / "base"), list(map(str, experts)), options=quiet)
        squares = dict(zip(found.experts, found.squared_norms, strict=True))
        return {expert.name: math.sqrt(squares[str(expert)]) for expert in experts}

    def grid(self) -> dict[float, float]:
        """Return the mean validation loss of task arithmetic by its scaling coefficient."""
        losses = {}
        for weight in GRID:
            scores = self._merged(task_arithmetic(weight), "validation")
            losses[weight] = sum(score.loss for score in scores.values()) / len(scores)
        return losses

    def scores(self, best_of_grid: float) -> dict[str, dict[str, Score]]:
        """Return the test scores of the base, experts and merges, by model and task."""
        methods = {
            **BASELINES,
            BEST_OF_GRID: task_arithmetic(best_of_grid),
            **METAGPT,
        }
        return {
            "base": self._scores(self.folder / "base", "test"),
            **{expert_name(task): self._scores(self.folder / task, "test") for task in TASKS},
            **{name: self._merged(method, "test") for name, method in methods.items()},
        }

    def _merged(self, method: Method, split: str) -> dict[str, Score]:
        out = self.folder / "merged"
        experts = [self.folder / task for task in TASKS]
        merge(method, self.folder / "base", experts, out, self.seed, self.device)
        scores = self._scores(out, split)
        shutil.rmtree(out)
        return scores

    def _scores(self, model: Path, split: str) -> dict[str, Score]:
        names = [f"{task}_{split}" for task in TASKS]
        tasks = self.folder / "tasks"
        found = score(model, names, tasks, device=self.device, batch_size=128)
        return {
            task: Score(
                accuracy=100 * found[f"{task}_{split}"]["acc,none"],
                loss=math.log(found[f"{task}_{split}"]["perplexity,none"]),
            )
            for task in TASKS
        }
