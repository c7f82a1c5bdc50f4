"""``mergekit-metagpt evaluate``, on tiny models and tasks."""

import json
import re
import shutil
import sys
from pathlib import Path

import lm_eval
import pytest
from conftest import invoke, llama_config, merge_config, put_nan, write_yaml
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from paper_stand_ins import save_choice_tasks, save_model

from benchmarks.harness_tasks import Example, write_answers, write_text
from mergekit_metagpt.evaluation import harness

MODELS = ("base", "expert a", "expert b", "merge")
TASKS = "agieval,one,text"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a config, its models, their merge, tasks, and the scores of all models."""
    folder = tmp_path_factory.mktemp("made")
    paths = {name: str(folder / name) for name in ("base", "a", "b")}
    for path in paths.values():
        save_model(Path(path), tokens=llama_config().vocab_size)
    write_yaml(folder / "metagpt.yml", merge_config(paths))
    write_answers(folder / "tasks", "one", [Example(f"w{n}", f"w{n + 1}") for n in range(3, 15)])
    questions = [{"q": f"w{n}", "c": [f"w{n + 9}", f"w{n + 2}"]} for n in range(40)]
    save_choice_tasks(folder / "tasks", questions)
    write_text(folder / "tasks", "text", [f"w{n} w{n + 1} w{n + 2}" for n in range(3, 12)])
    invoke("merge", folder / "metagpt.yml", folder / "merged", "--random-seed", 0)
    evaluate(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it that a test may change."""
    copy = shutil.copytree(made, tmp_path / "made")
    config = copy / "metagpt.yml"
    config.write_text(config.read_text().replace(str(made), str(copy)))
    return copy


def evaluate(folder, *words, tasks=TASKS, status=0):
    given = ("--tasks", tasks, "--include-path", folder / "tasks", *words)
    return invoke("evaluate", folder / "metagpt.yml", folder / "merged", *given, status=status)


def as_json(folder, *words, **changes):
    return json.loads(evaluate(folder, "--json", *words, **changes).stdout)


def scored(done):
    """Return the models that a run had to score."""
    return tuple(re.findall("^Scoring (.*)$", done.stderr, flags=re.MULTILINE))


def files(folder, model):
    """Return the results files of a model."""
    own = [p for p in (folder / "merged.scores").iterdir() if p.name.endswith(f"__{model}")]
    return sorted(file for directory in own for file in directory.glob("results_*.json"))


class TestTheTable:
    def test_it_has_a_row_for_each_model_and_a_column_for_each_task(self, made):
        lines = evaluate(made).stdout.splitlines()
        heads = " ".join(" ".join(lines[:5]).split())
        for head in (*TASKS.split(","), "acc", "↓", "Abs. Avg", "Nor. Avg", "ALD"):
            assert head in heads
        rows = [line.strip() for line in lines if line.strip().startswith(MODELS)]
        assert len(rows) == len(MODELS)
        assert sum(row.count("*") for row in rows) == 3
        assert all("*" not in rows[number] for number in (0, 3))
        assert [row.split()[-2] for row in rows] == ["n/a"] * 4  # no expert has a right answer

    def test_its_figures_are_lm_evals(self, made):
        tasks = TaskManager(include_path=str(made / "tasks"), include_defaults=False)
        report = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(made / "merged")}, tasks=TASKS.split(","),
            task_manager=tasks, device="cpu", bootstrap_iters=0,
        )["results"]  # fmt: skip
        found = as_json(made)["models"][-1]
        keys = ("acc,none", "acc,none", "word_perplexity,none")
        expected = [report[task][key] for task, key in zip(TASKS.split(","), keys, strict=True)]
        assert found["model"] == "merge"
        assert found["scores"] == pytest.approx(expected)
        assert found["losses"][0] is None
        assert found["absolute_average"] == pytest.approx(sum(expected[:2]) / 2)


class TestTheResults:
    def test_they_lie_beside_the_merge_as_lm_eval_writes_them(self, made, tmp_path):
        tracker = EvaluationTracker(output_path=str(tmp_path))
        model_args = {"pretrained": str(made / "merged")}
        tracker.general_config_tracker.log_experiment_args("hf", model_args, None, None, False)
        tracker.save_results_aggregated({})
        (expected,) = tmp_path.glob("*/results_*.json")
        (file,) = files(made, "merged")
        assert file.parent.name == expected.parent.name
        results = json.loads(file.read_text())
        assert json.loads(expected.read_text()).keys() <= results.keys()
        assert results["config"]["model_args"] == model_args
        assert make_table(results).count("word_perplexity") == 1

    def test_a_model_is_scored_again_only_if_its_weights_change(self, folder):
        assert scored(evaluate(folder, tasks="one")) == ()
        shutil.copy(folder / "b" / "model.safetensors", folder / "a")
        assert scored(evaluate(folder)) == ()  # b's weights are known, wherever they are
        put_nan(str(folder / "a"), "model.norm.weight")
        (file,) = files(folder, "merged")
        file.write_text(file.read_text()[:99])  # as if the run had been killed
        for number, content in enumerate(("{}", "[]", '{"config": null}')):
            file.with_name(f"results_{number}.json").write_text(content)
        assert scored(evaluate(folder)) == ("expert a", "merge")

    def test_a_model_is_scored_again_if_it_computes_or_reads_otherwise(self, folder):
        for name, old, new in (("config", "1e-06", "1e-02"), ("tokenizer", '"w9"', '"v9"')):
            file = folder / "merged" / f"{name}.json"
            text = file.read_text()
            file.write_text(text.replace(old, new))
            assert file.read_text() != text
            assert scored(evaluate(folder, tasks="one")) == ("merge",)

    def test_every_model_is_if_the_settings_or_the_tasks_change(self, folder):
        data = folder / "tasks" / "one.jsonl"
        for words, run in (([], MODELS), ([], ()), (["--shots", 1], MODELS)):
            assert scored(evaluate(folder, "--limit", 4, *words, tasks="one")) == run
        data.write_text(data.read_text().replace("w7", "w8"))
        assert scored(evaluate(folder, "--limit", 4, tasks="one")) == MODELS

    def test_only_tasks_that_are_missing_are_run(self, folder, monkeypatch):
        run, load_tasks = [], harness.load_tasks
        monkeypatch.setattr(harness, "load_tasks", lambda *it: run.append(it[0]) or load_tasks(*it))
        evaluate(folder, "--limit", 3, tasks="one")
        evaluate(folder, "--limit", 3, tasks="one,text")
        assert run == [["one"]] * 4 + [["text"]] * 4


class TestRefusals:
    def test_a_task_that_does_not_exist_has_a_suggestion(self, made, monkeypatch):
        def without_its_own(folder, _with_own):
            return TaskManager(include_path=folder, include_defaults=False)

        monkeypatch.setattr(harness, "_task_manager", without_its_own)  # indexing takes seconds
        done = evaluate(made, tasks="agi_eval", status=1)
        assert done.stderr.endswith("lm-eval has no task agi_eval; write agieval instead.\n")
        many = [f"task {number}" for number in range(10_000)]
        monkeypatch.setattr(TaskManager, "all_subtasks", many)
        done = evaluate(made, tasks="none", status=1)
        assert "no task none; correct its name, or name the folder of its own" in done.stderr
        assert len(done.stderr) < 300  # lm-eval knows thousands

    def test_a_task_whose_data_is_missing_or_that_runs_code_is_named(self, folder):
        write_answers(folder / "tasks", "two", [])
        (folder / "tasks" / "two.jsonl").unlink()
        done = evaluate(folder, tasks="two", status=1)
        assert f"Error: lm-eval could not score {folder / 'base'} on two (" in done.stderr
        file = folder / "tasks" / "one.yaml"
        file.write_text(f"{file.read_text()}unsafe_code: true\n")
        done = evaluate(folder, tasks="one", status=1)
        assert "on one (Attempted to run task: one which is marked as unsafe)" in done.stderr
        assert scored(done) == ("base",)

    def test_without_merge_or_lm_eval_the_command_for_it_is_named(self, folder, monkeypatch):
        shutil.rmtree(folder / "merged")
        done = evaluate(folder, status=1)
        assert f"There is no merge in {folder / 'merged'}; run mergekit-metagpt " in done.stderr
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        done = evaluate(folder, status=1)
        assert done.stderr == (
            "Error: Scoring needs lm-eval; run: pip install 'mergekit-metagpt[evaluate]'\n"
        )

    def test_models_and_results_that_fail_are_named(self, folder):
        for file in (folder / "b").glob("tokenizer*"):
            file.unlink()
        shutil.rmtree(folder / "merged.scores")
        done = evaluate(folder, tasks="one", status=1)
        assert f"Error: lm-eval could not score {folder / 'b'} on one (" in done.stderr
        assert files(folder, "a")
        shutil.rmtree(folder / "merged.scores")
        (folder / "merged.scores").touch()
        assert "could not be written to" in evaluate(folder, tasks="one", status=1).stderr
