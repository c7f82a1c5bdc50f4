"""``mergekit-metagpt demo``, small."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import invoke, read, run
from rich.console import Console

import mergekit_metagpt
from mergekit_metagpt.cli.demo import run_demo
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.demo.models import (
    TASKS,
    Scale,
    encode,
    examples,
    make_tokenizer,
    merge_configs,
    train_family,
)

SMALL = Scale(hidden_size=16, layers=1, batch=6, base_steps=3, expert_steps=3, held_out=20)
MODELS = ["base", *TASKS]
MERGES = [*(f"metagpt-{name}" for name in GRANULARITIES), "task-arithmetic", "average"]
EXAMPLE = Path(__file__).parents[1] / "example_configs" / "demo.yml"


def test_a_demo_scores_every_model_and_leaves_merges_that_load(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    run_demo(tmp_path, SMALL, console)
    text = console.file.getvalue()
    experts = [f"expert {task}" for task in TASKS]
    rows = {}
    for name in ("base", *experts, *MERGES, *TASKS):
        (line,) = (line for line in text.splitlines() if line.startswith(f" {name} "))
        rows[name] = [float(cell) for cell in line.removeprefix(f" {name} ").split()]
    for name in ("base", *experts, *MERGES):
        *scores, average = rows[name]
        assert len(scores) == len(TASKS)
        assert all(0 <= score <= 100 for score in scores)
        assert average == pytest.approx(sum(scores) / len(TASKS), abs=0.1)

    survey = mergekit_metagpt.survey(tmp_path / "base", [tmp_path / task for task in TASKS])
    for expert in survey.summary.experts:
        figures = [expert.norm, expert.mean]
        assert rows[Path(str(expert.model)).name] == pytest.approx(figures, rel=1e-3)

    base = read(tmp_path / "base")["lm_head.weight"]
    for name in MERGES:
        assert not torch.equal(read(tmp_path / "merged" / name)["lm_head.weight"], base)
        recorded = tmp_path / "merged" / name / "mergekit_config.yml"
        assert recorded.read_text() == (tmp_path / f"{name}.yml").read_text()
    words = f"{tmp_path}/metagpt-direction.yml {tmp_path}/merged/metagpt-direction"
    assert f"mergekit-yaml {words}" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "merged", *MODELS, *(f"{name}.yml" for name in MERGES)
    }  # fmt: skip

    torch.manual_seed(5)  # whatever was drawn before, the same models are trained again
    train_family(tmp_path / "again", SMALL)
    for model in MODELS:
        first, second = read(tmp_path / model), read(tmp_path / "again" / model)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stock_command_that_fails_is_told_in_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "mergekit-yaml").write_text(
        f"#!{sys.executable}\nraise SystemExit('no such model')"
    )
    (tmp_path / "mergekit-yaml").chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("mergekit_metagpt.demo.models.Scale", lambda: SMALL)
    said = invoke("demo", tmp_path / "demo", status=1).output
    assert "mergekit-yaml" in said
    assert said.endswith("no such model\n\n")
    assert not (tmp_path / "demo").exists()
    (tmp_path / "mergekit-yaml").unlink()
    assert "install MergeKit" in invoke("demo", tmp_path / "demo", status=1).output


def test_training_lowers_the_loss_of_an_experts_own_task(tmp_path):
    train_family(tmp_path, replace(SMALL, expert_steps=60))
    ids, losses = encode(make_tokenizer(), examples("sort", SMALL)[0]), []
    for name in ("sort", "base"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.inference_mode():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] < losses[1]


def test_a_task_has_one_right_answer_and_no_held_out_example_is_trained_on(tmp_path):
    answers = {task: answer("709056") for task, answer in TASKS.items()}
    assert answers == {"reverse": "650907", "sort": "005679", "double": "418112"}
    for task in TASKS:
        drawn = examples(task, SMALL)
        assert list(map(len, drawn)) == [20, 6, 18]
        assert len(set().union(*drawn)) == 44
    tokenizer, line = make_tokenizer(), drawn[0][0]
    tokenizer.save_pretrained(tmp_path)
    for known in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        ids = known(line)["input_ids"]
        assert (len(ids), known.decode(ids)) == (16, f"<s> {line}")


def test_the_example_config_is_what_the_demo_merges():
    example = yaml.safe_load(EXAMPLE.read_text().replace("./metagpt-demo", "metagpt-demo"))
    assert example == merge_configs(Path("metagpt-demo"))["metagpt-direction"]


def test_directories_that_cannot_be_used_are_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    assert invoke("demo", tmp_path, status=1).output == (
        f"Error: {tmp_path} is not empty; choose another directory.\n"
    )
    for name in ("a+b", "a@b"):  # which MergeKit would misread
        said = invoke("demo", tmp_path / name, status=1).output
        assert "choose another directory" in said
    said = invoke("demo", tmp_path / "mine.txt" / "inside", status=1).output
    assert "cannot be used (Not a directory)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_list_of_commands_imports_neither_torch_nor_mergekit():
    script = """
import sys
from click.testing import CliRunner
from mergekit_metagpt.cli import main
print(*(CliRunner().invoke(main, [word]).exit_code for word in ("--help", "--version", "nonsense")))
print({"torch", "mergekit", "transformers"} & {*sys.modules})
"""
    done = run(sys.executable, "-c", script)
    assert done.stdout == "0 0 2\nset()\n", done.stderr
