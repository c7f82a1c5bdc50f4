"""`python -m benchmarks.quality`, on a family of minuscule models."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner
from paper_stand_ins import score

from benchmarks import results_file
from benchmarks.quality import __main__ as command
from benchmarks.quality import measure
from benchmarks.quality.families import Family, Score, expert_name
from benchmarks.quality.measure import BEST_OF_GRID, RECIPES
from benchmarks.quality.merges import BASELINES, METAGPT
from benchmarks.quality.models import Size, Trainer
from benchmarks.quality.tasks import TASKS, held_out, training

TINY = Size(
    hidden_size=16, layers=1, base_steps=30, base_rate=2e-3, expert_steps=30, batch=8, held_out=6
)
GRID = (0.2, 0.6)
MERGES = [*BASELINES, BEST_OF_GRID, *METAGPT]
FEW = ["exponent 0, model", "MetaGPT, direction", "DARE + MetaGPT, layer"]
SCORED = [*BASELINES, BEST_OF_GRID, *FEW]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality") / "family"


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    trainer = Trainer(TINY, seed=0, device="cpu")
    few = {name: METAGPT[name] for name in FEW}
    with mock.patch.multiple(measure, GRID=GRID, METAGPT=few):
        return measure.measure_family("tiny", trainer, trainer.base(), "even", folder)


def test_the_averages_are_relative_to_the_experts_at_home():
    at_home = {expert_name(task): dict.fromkeys(TASKS, Score(80.0, 0.5)) for task in TASKS}
    merged = {task: Score(40.0, 0.5 + number) for number, task in enumerate(TASKS)}
    scores = {"base": dict.fromkeys(TASKS, Score(0.0, 2.0)), **at_home, "merged": merged}
    family = Family("tiny", "even", 0, 1000, dict.fromkeys(TASKS, 1.0), {}, scores)
    assert family.absolute_average("merged") == 40
    assert family.normalized_average("merged") == 0.5
    assert family.loss_difference("merged") == 1.5
    assert family.gain("recall") == 1.5
    assert family.coefficients() == dict.fromkeys(TASKS, 0.25)


def test_every_model_is_scored_on_every_task_by_lm_eval(family, folder):
    assert list(family.scores) == ["base", *map(expert_name, TASKS), *SCORED]
    assert all(list(scores) == list(TASKS) for scores in family.scores.values())
    assert list(family.grid) == list(GRID)
    assert all(family.gain(task) > 0 for task in TASKS)
    for task, found in family.scores["base"].items():
        expected = score(folder / "base", held_out(task, 0, TINY.held_out)["test"])
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.accuracy == pytest.approx(expected.accuracy)
        average = family.scores["weight average"][task].loss
        assert family.scores["exponent 0, model"][task].loss == pytest.approx(average, rel=1e-5)


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
def test_only_the_full_run_replaces_the_results(family, tmp_path, monkeypatch, words, written):
    scores = dict.fromkeys(MERGES, family.scores[BEST_OF_GRID]) | family.scores
    families = [replace(family, recipe=it, seed=n, scores=scores) for it in RECIPES for n in (0, 1)]
    monkeypatch.setattr(command, "measure_families", lambda *_: families)
    for module in (command, results_file):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    result = CliRunner().invoke(command.main, words, catch_exceptions=False)
    for row in ("base", *map(expert_name, TASKS), *MERGES):
        assert result.output.count(f"| {row} | ") >= len(RECIPES)
    assert "0 of 2" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert all(path.stat().st_size < 100_000 for path in tmp_path.glob("*.png"))
