"""`python -m benchmarks.quality`: its data, its averages and its files."""

from itertools import islice

import pytest
from click.testing import CliRunner

from benchmarks import results_file
from benchmarks.quality import __main__ as command
from benchmarks.quality.families import Family, Score, expert_name
from benchmarks.quality.measure import BEST_OF_GRID, RECIPES
from benchmarks.quality.merges import BASELINES, METAGPT
from benchmarks.quality.tasks import TASKS, held_out, training

MERGES = [*BASELINES, BEST_OF_GRID, *METAGPT]


def made_up(recipe: str, seed: int) -> Family:
    """Return a family whose merges are worse than the experts by one nat more on each task."""
    merged = {task: Score(40.0, 0.5 + number) for number, task in enumerate(TASKS)}
    scores = {"base": dict.fromkeys(TASKS, Score(0.0, 2.0))}
    scores |= {expert_name(task): dict.fromkeys(TASKS, Score(80.0, 0.5)) for task in TASKS}
    scores |= dict.fromkeys(MERGES, merged)
    grid = {0.2: 1.0, 0.6: 2.0}
    return Family("tiny", recipe, seed, 1000, dict.fromkeys(TASKS, 1.0), grid, scores)


def test_the_averages_are_relative_to_the_experts_at_home():
    family = made_up("even", 0)
    assert family.absolute_average(BEST_OF_GRID) == 40
    assert family.normalized_average(BEST_OF_GRID) == 0.5
    assert family.loss_difference(BEST_OF_GRID) == 1.5
    assert family.gain("recall") == 1.5
    assert family.coefficients() == dict.fromkeys(TASKS, 0.25)


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_example_is_trained_on_but_facts_that_nothing_else_tells(task):
    splits = held_out(task, seed=0, count=128)
    kept = set(splits["validation"]) | set(splits["test"])
    assert len(kept) == 256
    trained = set(islice(training(task, 0, "expert", 128), 5000))
    assert kept <= trained if task == "recall" else kept.isdisjoint(trained)


@pytest.mark.parametrize(
    ("words", "written"),
    [([], ["quality.json", "quality.md", "quality.png"]), (["--quick"], [])],
)
def test_only_the_full_run_replaces_the_results(tmp_path, monkeypatch, words, written):
    families = [made_up(recipe, seed) for recipe in RECIPES for seed in (0, 1)]
    monkeypatch.setattr(command, "measure_families", lambda *_: families)
    for module in (command, results_file):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    result = CliRunner().invoke(command.main, words, catch_exceptions=False)
    for row in ("base", *map(expert_name, TASKS), *MERGES):
        assert result.output.count(f"| {row} | ") >= len(RECIPES)
    assert "0 of 2" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == written
