"""The paper's tables, merged and measured on tiny stand-ins and tasks of our own."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import click
import lm_eval.tasks
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import write_yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from mergekit.config import MergeConfiguration
from mergekit.scripts import run_yaml
from paper_stand_ins import save_models, save_tasks

from benchmarks.harness import score
from benchmarks.paper.__main__ import main
from benchmarks.paper.merges import merge, with_local_models
from benchmarks.paper.tables import Row, read_table, table_numbers
from mergekit_metagpt.evaluation import harness
from mergekit_metagpt.preflight import inspect

ROWS = [
    pytest.param(row, id=f"{number}: {row.name}")
    for number in table_numbers()
    for row in read_table(number).rows
]
MERGES = [case for case in ROWS if isinstance(case.values[0].source, dict)]
SAFE_COLUMNS = [column for column in read_table(1).columns if not column.runs_code]
FIRST_ROWS = [f"--only={row}" for row in ("LM", "Math", "Code", "DARE", "MetaGPT")]
EXAMPLES = Path(__file__).parents[1] / "example_configs"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for every model of the paper's tables."""
    folder = tmp_path_factory.mktemp("models")
    configs = [MergeConfiguration.model_validate(case.values[0].source) for case in MERGES]
    save_models(folder, {str(it) for config in configs for it in config.referenced_models()})
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_tasks(folder)
    return folder


@pytest.fixture(scope="session")
def of_lm_eval() -> TaskManager:
    """lm-eval's own tasks that the tables name. To index all of them takes half a minute."""
    names = ["agieval", "gsm8k", "humaneval", "mbpp", "medqa", "minerva_math", "winogrande"]
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in names]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="session", autouse=True)
def _in_this_process():
    """Run mergekit-yaml here."""

    def run(words):
        return SimpleNamespace(returncode=CliRunner().invoke(run_yaml.main, words[1:]).exit_code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.paper.merges.subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="session")
def paper(models: Path, tasks: Path) -> Callable[..., Result]:
    """Run the command on the stand-ins, with the words and the options that a test wants."""

    def invoke(*words: str | Path, **changes: Path) -> Result:
        folders = {"models": models, "tasks": tasks, **changes}
        options = [f"--{name}={folder}" for name, folder in folders.items()]
        return CliRunner(env={"HF_ALLOW_CODE_EVAL": "0"}).invoke(main, [*map(str, words), *options])

    return invoke


@pytest.fixture(scope="session")
def first_run(paper, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The experts and two merges of table 1: the output directory, and what the command said.

    Another run has died in the middle of one merge; of the other there is an older config's.
    """
    out = tmp_path_factory.mktemp("first") / "out"
    for remains in ("metagpt/merged-partial", "dare/merged"):
        (out / "llama-2-7b" / remains).mkdir(parents=True)
        (out / "llama-2-7b" / remains / "mergekit_config.yml").write_text("merge_method: linear")
    done = paper("1", *FIRST_ROWS, out=out)
    assert done.exit_code == 0, done.output
    return out, done


def local_row(number: int, name: str, models: Path) -> Row:
    (row,) = (row for row in read_table(number).rows if row.name == name)
    return with_local_models(row, models)


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return what is stored, by row and column."""
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_text())
        for path in out.rglob("*.json")
    }


def printed(output: str, row: str) -> tuple[list[str], list[str]]:
    """Return the figures of a row, measured and published."""
    found = re.search(rf"^ *{re.escape(row)} +measured(.*)\n +published(.*)$", output, re.M)
    return found[1].split(), found[2].split()


@pytest.mark.parametrize("row", MERGES)
def test_nothing_stands_against_a_merge_of_the_tables(row, models, tmp_path):
    config = with_local_models(row, models).source
    inspect(str(write_yaml(tmp_path / "merge.yml", config)))


def test_a_merge_with_metagpt_is_the_example_config_and_has_its_experts():
    examples = {
        (1, "MetaGPT"): "llama-2-7b",
        (2, "MetaGPT"): "mistral-7b",
        (3, "MetaGPT"): "llama-2-13b",
        (4, "Ties + MetaGPT"): "ties",
        (4, "DARE + MetaGPT"): "dare",
        (5, "MetaGPT"): "llama-2-7b",
    }
    for (number, row), example in examples.items():
        table = read_table(number)
        (config,) = (it.source for it in table.rows if it.name == row)
        assert config == yaml.safe_load((EXAMPLES / f"{example}.yml").read_text())
        models = [model["model"] for model in table.rows[-1].source["models"]]
        assert [table.experts[name].source for name in ("LM", "Math", "Code")] == models


@pytest.mark.xdist_group("paper")
def test_lm_eval_has_the_tasks_and_their_metrics(of_lm_eval):
    index = of_lm_eval.task_index
    columns = {column.name: column for n in table_numbers() for column in read_table(n).columns}
    assert [name for name, column in columns.items() if not column.tasks] == ["FinanceIQ"]
    for column in columns.values():
        metric, wanted = column.metric.split(",")
        for task in column.tasks:
            config = load_yaml(index[task].yaml_path, resolve_func=False)
            filters = config.get("filter_list", [{"name": "none"}])
            metrics = config.get("metric_list") or config["aggregate_metric_list"]
            names = [it["metric"].rpartition(".")[2] for it in metrics]
            assert wanted in [it["name"] for it in filters]
            # HumanEval's function pass_at_k names its figures pass@1, pass@2 and so on.
            assert metric.replace("@1", "_at_k") in names
            assert config.get("unsafe_code", False) == column.runs_code


@pytest.mark.xdist_group("paper")
def test_a_row_is_measured_on_its_own_merge_and_printed_beside_the_papers_figures(
    first_run, models, tasks, tmp_path
):
    out, first = first_run
    row, checkpoint = local_row(1, "DARE", models), tmp_path / "merged"
    merge(row, checkpoint)
    measured, published = printed(first.stdout, "DARE")
    for number, column in enumerate(SAFE_COLUMNS):
        wanted = {"shots": column.shots, "shot_answer": column.shot_answer}
        found = score(checkpoint, column.tasks, tasks, device="cpu", **wanted)
        percent = 100 * found[column.tasks[0]][column.metric]
        assert results(out)[f"dare/{column.name}"]["score"] == pytest.approx(percent)
        assert measured[number] == f"{percent:.2f}"
        assert published[number] == f"{row.scores[number]:.2f}"


@pytest.mark.xdist_group("paper")
def test_averages_are_over_what_was_measured_and_merges_are_deleted_when_scored(
    first_run,
):
    out, first = first_run
    *measured, average, _ = printed(first.stdout, "MetaGPT")[0]
    assert float(average) == pytest.approx(
        fmean(float(it) for it in measured if it != "-"), abs=0.01
    )
    # The paper's MetaGPT on WinoGrande, AGIEval, GSM8k and MATH.
    assert printed(first.stdout, "MetaGPT")[1][6:] == ["37.54", "1.550"]
    assert first.stderr.count("merging with mergekit-yaml") == 2
    left = {path.name for path in out.rglob("*") if path.suffix != ".json"}
    assert left == {"llama-2-7b", "lm", "math", "code", "dare", "metagpt", "merge.yml"}


@pytest.mark.xdist_group("paper")
def test_a_second_run_and_another_table_take_up_what_was_measured(first_run, paper):
    out, first = first_run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = paper("1", *FIRST_ROWS, out=out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (done.stdout, done.stderr) == (first.stdout, "")
    done = paper("4", "--only=DARE", out=out)
    assert "merging" not in done.stderr
    assert printed(done.stdout, "DARE") == printed(first.stdout, "DARE")


@pytest.mark.xdist_group("paper")
def test_code_is_run_only_when_asked_for(first_run, paper, tmp_path):
    out, first = first_run
    assert printed(first.stdout, "LM")[0][4:6] == ["-", "-"]
    assert "Not run, since they execute what the model writes: MBPP, HumanEval" in first.stdout
    shutil.copytree(out, tmp_path / "out")
    done = paper("1", "--only=LM", "--confirm-run-unsafe-code", out=tmp_path / "out")
    assert printed(done.stdout, "LM")[0][4:6] == ["50.00", "25.00"]
    assert "Not run" not in done.stdout


def test_a_whole_merge_is_not_made_again_and_one_that_fails_leaves_its_config(
    models, tmp_path, monkeypatch
):
    row = local_row(2, "MetaGPT", models)
    merge(row, tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    merge(row, tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    broken = replace(row, source={**row.source, "merge_method": "no_such_method"})
    (tmp_path / "broken").mkdir()
    with pytest.raises(click.ClickException, match=r"could not merge .*merge\.yml \(exit status 1"):
        merge(broken, tmp_path / "broken" / "merged")
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["merge.yml"]


def test_a_few_questions_are_kept_apart_and_what_lm_eval_lacks_is_said(paper, tmp_path):
    few = paper("5", "--only=LM", "--limit=3", out=tmp_path)
    assert "Only the first 3 questions of each task were asked." in few.stdout
    right = results(tmp_path)["lm/MedQA-first-3"]["score"] * 3 / 100
    assert right == pytest.approx(round(right))
    whole = paper("5", "--only=LM", out=tmp_path)
    assert "LM: MedQA" in whole.stderr
    assert len(results(tmp_path)) == 4
    measured, published = printed(whole.stdout, "LM")
    assert measured[1] == "-"
    assert published == ["31.32", "32.83", "30.20", "30.76"]
    assert "Not in lm-eval: FinanceIQ." in whole.stdout
    parts = results(tmp_path)["lm/JEC-QA"]
    accuracies = [metrics["acc,none"] for metrics in parts["metrics"].values()]
    assert len(accuracies) == 2
    assert parts["score"] == pytest.approx(50 * sum(accuracies))


@pytest.mark.xdist_group("paper")
@pytest.mark.parametrize(
    ("words", "changes", "sentence"),
    [
        (["4", "--only=Fisher"], {}, "its rows are Ties Merging, Ties + MetaGPT, DARE, DARE + M"),
        (["1"], {"models": "empty"}, "has no checkpoint of meta-llama/Llama-2-7b-chat-hf; put it"),
        (["1"], {"tasks": "empty"}, "lm-eval cannot load winogrande (WinoGrande):"),
        (["5", "--only=LM"], {"models": "copy"}, "Error: lm-eval could not measure LM on JEC-QA: "),
        (["1", "--only=LM"], {}, "pip install 'mergekit-metagpt[benchmarks]'"),
    ],
    ids=["no row", "no models", "no tasks", "no tokenizers", "no lm-eval"],
)
def test_what_is_missing_is_one_sentence_before_anything_is_written(
    words, changes, sentence, paper, models,
    of_lm_eval, tmp_path, monkeypatch,
):  # fmt: skip
    (tmp_path / "empty").mkdir()
    if changes.get("models") == "copy":
        shutil.copytree(models, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    if "pip install" in sentence:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if "lm-eval cannot" in sentence:
        monkeypatch.setattr(harness, "_task_manager", lambda folder, own: of_lm_eval)
    folders = {option: tmp_path / folder for option, folder in changes.items()}
    done = paper(*words, out=tmp_path / "out", **folders)
    assert done.exit_code == (2 if "rows" in sentence else 1)
    assert sentence in done.stderr
    assert results(tmp_path / "out") == {}
