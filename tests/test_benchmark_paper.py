"""The paper's tables, merged and measured on tiny stand-ins and tasks of our own."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import problems_of
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from mergekit.config import MergeConfiguration
from mergekit.scripts import run_yaml
from paper_stand_ins import save_choice_tasks, save_models

from benchmarks.harness import score
from benchmarks.paper.__main__ import main
from benchmarks.paper.merges import merge, with_local_models
from benchmarks.paper.scores import Scores
from benchmarks.paper.tables import read_table, table_numbers
from mergekit_metagpt.evaluation import harness

MERGES = [
    pytest.param(row, id=f"{number}: {row.name}")
    for number in table_numbers()
    for row in read_table(number).rows
    if isinstance(row.source, dict)
]
OF_TABLE_5 = ["5", "--only=LM", "--only=MetaGPT"]
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
    questions = [
        {"q": f"w{3 + n} w{4 + n}", "c": [f"w{20 + n}", f"w{40 + n}"]}
        for n in range(16)  # more than there are solved examples
    ]
    save_choice_tasks(folder, questions)
    return folder


@pytest.fixture(scope="session")
def of_lm_eval() -> TaskManager:
    """lm-eval's own tasks that the tables name. To index all of them takes half a minute."""
    names = ["agieval", "gsm8k", "humaneval", "mbpp", "medqa", "minerva_math", "winogrande"]
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in names]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="session")
def paper(models: Path, tasks: Path) -> Iterator[Callable[..., Result]]:
    """Run the command on the stand-ins, with the words and the options that a test wants."""

    def invoke(*words: str | Path, **changes: Path) -> Result:
        folders = {"models": models, "tasks": tasks, **changes}
        options = [f"--{name}={folder}" for name, folder in folders.items()]
        return CliRunner().invoke(main, [*map(str, words), *options])

    def run(words):  # mergekit-yaml, in this process
        return SimpleNamespace(returncode=CliRunner().invoke(run_yaml.main, words[1:]).exit_code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.paper.merges.subprocess", SimpleNamespace(run=run))
        yield invoke


def printed(output: str, row: str) -> tuple[list[str], list[str]]:
    """Return the figures of a row, measured and published."""
    found = re.search(rf"^ *{re.escape(row)} +measured(.*)\n +published(.*)$", output, re.M)
    return found[1].split(), found[2].split()


@pytest.mark.parametrize("row", MERGES)
def test_nothing_stands_against_a_merge_of_the_tables(row, models, tmp_path):
    assert problems_of(with_local_models(row, models).source, tmp_path) == []


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
def test_a_row_is_measured_on_its_own_merge_and_only_once(paper, models, tasks, tmp_path):
    out, table = tmp_path / "out", read_table(5)
    for remains in ("merged-partial", "merged"):  # another run's, and an older config's
        folder = out / "llama-2-7b" / "metagpt" / remains
        folder.mkdir(parents=True)
        (folder / "mergekit_config.yml").write_text("merge_method: linear")
    few = paper("5", "--only=LM", "--limit=3", out=out)
    assert "Only the first 3 questions of each task were asked." in few.stdout
    done = paper(*OF_TABLE_5, out=out)
    assert "LM: MedQA" in done.stderr  # whose figure for few questions is kept apart
    assert "Not in lm-eval: FinanceIQ." in done.stdout

    row, checkpoint = table.rows[-1], tmp_path / "merged"
    merge(with_local_models(row, models), checkpoint)
    measured, published = printed(done.stdout, "MetaGPT")
    average = (row.scores[0] + row.scores[2]) / 2  # of the columns that were measured
    assert published == [f"{figure:.2f}" for figure in (*row.scores, average)]
    assert measured[1] == "-"
    for number in (0, 2):
        column = table.columns[number]
        wanted = {"shots": column.shots, "shot_answer": column.shot_answer}
        found = score(checkpoint, column.tasks, tasks, device="cpu", **wanted)
        parts = [100 * found[task][column.metric] for task in column.tasks]
        assert measured[number] == f"{sum(parts) / len(parts):.2f}"

    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".json" for path in files) == 2 * 3
    assert [path.name for path in files if path.suffix != ".json"] == ["merge.yml"]
    again = paper(*OF_TABLE_5, out=out)
    assert (again.stdout, again.stderr) == (done.stdout, "")


@pytest.mark.xdist_group("paper")
def test_averages_are_over_what_was_measured_and_code_is_run_only_when_asked_for(
    paper, tmp_path, monkeypatch
):
    (*_, row), columns = read_table(1).rows, read_table(1).columns
    unmeasured = [Scores(tmp_path, None, None, unsafe).missing(row, columns) for unsafe in (0, 1)]
    assert [len(its) for its in unmeasured] == [4, 6]
    places = {column.name: number for number, column in enumerate(columns)}

    def half(_, row, column):
        return math.nan if column.runs_code else row.scores[places[column.name]] / 2

    monkeypatch.setattr(Scores, "stored", half)
    said = paper("1", "--only=MetaGPT", out=tmp_path).stdout
    measured, published = printed(said, "MetaGPT")
    assert measured[4:] == ["-", "-", "18.77", "1.550"]
    assert published[6:] == ["37.54", "1.550"]  # on WinoGrande, AGIEval, GSM8k and MATH
    assert "Not run, since they execute what the model writes: MBPP, HumanEval" in said


@pytest.mark.xdist_group("paper")
@pytest.mark.parametrize(
    ("words", "changes", "sentence"),
    [
        (["4", "--only=Fisher"], {}, "its rows are Ties Merging, Ties + MetaGPT, DARE, DARE + M"),
        (["1"], {"models": "empty"}, "has no checkpoint of meta-llama/Llama-2-7b-chat-hf; put it"),
        (["1"], {"tasks": "empty"}, "lm-eval cannot load winogrande (WinoGrande):"),
        (["1", "--only=LM"], {}, "pip install 'mergekit-metagpt[benchmarks]'"),
    ],
    ids=["no row", "no models", "no tasks", "no lm-eval"],
)
def test_what_is_missing_is_one_sentence_before_anything_is_written(
    words, changes, sentence, paper, of_lm_eval, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    if "pip install" in sentence:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(harness, "_task_manager", lambda folder, own: of_lm_eval)
    folders = {option: tmp_path / folder for option, folder in changes.items()}
    done = paper(*words, out=tmp_path / "out", **folders)
    assert done.exit_code == (2 if "rows" in sentence else 1)
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()
