"""`python -m benchmarks.quality`, on a family of minuscule models."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from benchmarks import results_file
from benchmarks.quality import __main__ as command
from benchmarks.quality.families import Family, Score, expert_name
from benchmarks.quality.measure import BEST_OF_GRID, RECIPES, measure_family
from benchmarks.quality.merges import BASELINES, GRID, METAGPT
from benchmarks.quality.models import Size, Trainer
from benchmarks.quality.picture import draw
from benchmarks.quality.report import report
from benchmarks.quality.tasks import TASKS, held_out, training

TINY = Size(
    hidden_size=16, layers=1, base_steps=30, base_rate=2e-3, expert_steps=30, batch=8, held_out=8
)
MERGES = [*BASELINES, BEST_OF_GRID, *METAGPT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality") / "family"


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    trainer = Trainer(TINY, seed=0, device="cpu")
    return measure_family("tiny", trainer, trainer.base(), "even", folder)


def loss_and_accuracy(model: Path, task: str) -> Score:
    """Score a model on the test examples without lm-eval."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses, right = [], []
    for example in held_out(task, 0, TINY.held_out)["test"]:
        ids = tokenizer(" ".join(example), return_tensors="pt")["input_ids"]
        length = len(example.answer.split())
        with torch.inference_mode():
            predicted = network(input_ids=ids).logits[0, -length - 1 : -1].log_softmax(-1)
        answer = ids[0, -length:]
        losses.append(-predicted.gather(1, answer[:, None]).sum().item())
        right.append(bool((predicted.argmax(1) == answer).all()))
    return Score(100 * sum(right) / len(right), sum(losses) / len(losses))


def test_every_model_is_scored_on_every_task(family: Family) -> None:
    assert list(family.scores) == ["base", *map(expert_name, TASKS), *MERGES]
    assert all(list(scores) == list(TASKS) for scores in family.scores.values())
    assert list(family.grid) == list(GRID)


@pytest.mark.parametrize("task", TASKS)
def test_lm_eval_scores_the_answers_after_the_prompts(
    family: Family, folder: Path, task: str
) -> None:
    expected = loss_and_accuracy(folder / "base", task)
    assert family.scores["base"][task].loss == pytest.approx(expected.loss, rel=1e-4)
    assert family.scores["base"][task].accuracy == expected.accuracy


def test_experts_move_away_from_the_base_and_gain_on_their_own_task(family: Family) -> None:
    assert all(norm > 0 for norm in family.norms.values())
    assert all(family.gain(task) > 0 for task in TASKS)


def test_exponent_0_is_the_weight_average(family: Family) -> None:
    average, exponent_0 = family.scores["weight average"], family.scores["exponent 0, model"]
    for task in TASKS:
        assert exponent_0[task].loss == pytest.approx(average[task].loss, rel=1e-5)


def test_the_grid_has_task_arithmetic_at_its_best(family: Family) -> None:
    assert family.scores[BEST_OF_GRID] != family.scores["base"]
    assert min(family.grid.values()) < max(family.grid.values())


def test_the_averages_are_relative_to_the_experts_at_home() -> None:
    at_home = {expert_name(task): dict.fromkeys(TASKS, Score(80.0, 0.5)) for task in TASKS}
    merged = {task: Score(40.0, 0.5 + number) for number, task in enumerate(TASKS)}
    scores = {"base": dict.fromkeys(TASKS, Score(0.0, 2.0)), **at_home, "merged": merged}
    family = Family("tiny", "even", 0, 1000, dict.fromkeys(TASKS, 1.0), {}, scores)
    assert family.absolute_average("merged") == 40
    assert family.normalized_average("merged") == 0.5
    assert family.loss_difference("merged") == 1.5
    assert family.gain("recall") == 1.5
    assert family.coefficients() == dict.fromkeys(TASKS, 0.25)


def test_a_seed_gives_the_same_weights_each_time() -> None:
    first, second = (Trainer(TINY, seed=1, device="cpu").base() for _ in range(2))
    tensors = second.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_validation_and_test_share_no_example(task: str) -> None:
    splits = held_out(task, seed=0, count=128)
    assert len(set(splits["validation"]) | set(splits["test"])) == 256


@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"recall"}))
def test_no_held_out_example_is_trained_on(task: str) -> None:
    kept = {example for examples in held_out(task, 0, 128).values() for example in examples}
    assert kept.isdisjoint(islice(training(task, 0, "expert", 128), 5000))


def test_facts_are_trained_on_since_nothing_else_tells_them() -> None:
    kept = {example for examples in held_out("recall", 0, 128).values() for example in examples}
    assert kept <= set(islice(training("recall", 0, "expert", 128), 5000))


def families(family: Family) -> Iterator[Family]:
    for recipe in RECIPES:
        for seed in range(2):
            yield replace(family, recipe=recipe, seed=seed)


def test_the_report_has_a_line_for_every_model(family: Family) -> None:
    text = report(list(families(family)))
    for row in ("base", *map(expert_name, TASKS), *MERGES):
        assert text.count(f"| {row} | ") >= len(RECIPES)
    assert "0 of 2" in text


def test_the_picture_is_small(family: Family, tmp_path: Path) -> None:
    draw(list(families(family)), tmp_path / "quality.png")
    assert 0 < (tmp_path / "quality.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("words", "written"),
    [([], ["quality.json", "quality.md", "quality.png"]), (["--quick"], [])],
    ids=["full", "quick"],
)
def test_only_the_full_run_replaces_the_results(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    written: list[str],
) -> None:
    monkeypatch.setattr(command, "measure_families", lambda *_: families(family))
    for module in (command, results_file):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    result = CliRunner().invoke(command.main, words, catch_exceptions=False)
    assert "Abs. Avg" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == written
