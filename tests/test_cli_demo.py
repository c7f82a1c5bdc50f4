"""``mergekit-metagpt demo``, small."""

import io
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from conftest import read, run
from mergekit.config import MergeConfiguration
from rich.console import Console

from mergekit_metagpt import scaling_coefficients
from mergekit_metagpt.cli import main
from mergekit_metagpt.cli.demo import run_demo
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.demo.merges import (
    merge_configs,
    merge_with_mergekit,
    write_configs,
)
from mergekit_metagpt.demo.models import (
    TASKS,
    Examples,
    Scale,
    encode,
    make_tokenizer,
    train_family,
)
from mergekit_metagpt.measure.checkpoints import survey_checkpoints

SMALL = Scale(hidden_size=16, layers=1, batch=6, base_steps=3, expert_steps=3, held_out=20)
MODELS = ["base", *TASKS]
MERGES = [*(f"metagpt-{name}" for name in GRANULARITIES), "task-arithmetic", "average"]
EXAMPLE = Path(__file__).parents[1] / "example_configs" / "demo.yml"


def output() -> Console:
    return Console(file=io.StringIO(), width=120)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    tokens = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**tokens, max_new_tokens=7, do_sample=False)
    return tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_demo_scores_every_model_and_leaves_merges_that_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    console = output()
    run_demo(tmp_path, SMALL, console)
    text = console.file.getvalue()

    rows = {
        cells[0].strip(): [float(cell) for cell in cells[1:]]
        for cells in (line.strip("│").split("│") for line in text.splitlines() if "│" in line)
    }
    experts = [f"expert {task}" for task in TASKS]
    assert list(rows) == ["base", *experts, *MERGES, *TASKS]
    for name in ("base", *experts, *MERGES):
        *scores, average = rows[name]
        assert all(0 <= score <= 100 for score in scores)
        assert average == pytest.approx(sum(scores) / len(TASKS), abs=0.1)

    survey = survey_checkpoints(
        str(tmp_path / "base"), [str(tmp_path / task) for task in TASKS], progress=False
    )
    coefficients = scaling_coefficients(survey.model)
    for expert, norm, coefficient in zip(survey.experts, survey.model, coefficients, strict=True):
        assert rows[Path(str(expert)).name] == pytest.approx([norm**0.5, coefficient], abs=1e-4)

    for name in MERGES:
        assert (tmp_path / f"{name}.yml").is_file()
        merged = tmp_path / "merged" / name
        model = transformers.AutoModelForCausalLM.from_pretrained(merged)
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
        assert isinstance(answer(model, tokenizer, "sort 4 1 3 0 2 5 ="), str)
        assert not torch.equal(
            model.state_dict()["lm_head.weight"], read(tmp_path / "base")["lm_head.weight"]
        )
    assert (
        f"mergekit-yaml {tmp_path}/metagpt-direction.yml {tmp_path}/merged/metagpt-direction"
        in text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["merged", *MODELS, *(f"{name}.yml" for name in MERGES)]
    )


def test_a_demo_trains_the_same_models_again(tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # whatever was drawn before
        train_family(tmp_path / name, SMALL)
    for model in MODELS:
        first, second = read(tmp_path / "first" / model), read(tmp_path / "second" / model)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss_of_an_experts_own_task(tmp_path):
    train_family(tmp_path, Scale(**{**vars(SMALL), "expert_steps": 60}))
    losses = {}
    for name in ("base", "sort"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids = encode(make_tokenizer(), Examples.of("sort", SMALL).held_out)
        with torch.inference_mode():
            losses[name] = model(input_ids=ids, labels=ids).loss.item()
    assert losses["sort"] < losses["base"]


@pytest.mark.parametrize(
    ("task", "expected"), [("reverse", "650907"), ("sort", "005679"), ("double", "418112")]
)
def test_a_task_has_one_right_answer(task, expected):
    assert TASKS[task]("709056") == expected


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_example_is_trained_on(task):
    examples = Examples.of(task, SMALL)
    lines = [*examples.held_out, *examples.base, *examples.expert]
    assert len(set(lines)) == len(lines)
    assert (len(examples.held_out), len(examples.base), len(examples.expert)) == (20, 6, 18)


def test_the_tokenizer_keeps_every_word_and_digit(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    line = Examples.of("double", SMALL).held_out[0]
    for known in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        encoded = known(line)
        assert set(encoded) == {"input_ids", "attention_mask"}
        assert len(encoded["input_ids"]) == 16
        assert known.decode(encoded["input_ids"]) == f"<s> {line}"
        assert known.unk_token_id not in encoded["input_ids"]


def test_the_configs_are_stock_configs_with_the_experts_by_absolute_path(tmp_path):
    files = write_configs(tmp_path, merge_configs(tmp_path))
    assert list(files) == MERGES
    for file in files.values():
        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        paths = {str(model) for model in config.referenced_models()}
        assert paths >= {str(tmp_path / task) for task in TASKS}
        assert all(Path(path).is_absolute() for path in paths)


def test_the_example_config_is_what_the_demo_merges():
    example = yaml.safe_load(EXAMPLE.read_text().replace("./metagpt-demo", "metagpt-demo"))
    assert example == merge_configs(Path("metagpt-demo"))["metagpt-direction"]


def test_a_directory_that_is_not_empty_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    result = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {tmp_path} is not empty; choose another directory or delete it.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["a+b", "a@b"])
def test_a_directory_that_mergekit_would_misread_is_refused(tmp_path, name):
    result = CliRunner().invoke(main, ["demo", str(tmp_path / name)])
    assert result.exit_code == 1
    assert "choose another directory" in result.output
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "file" / "inside")])
    assert result.exit_code == 1
    assert "cannot be used (Not a directory)" in result.output


def test_a_merge_that_fails_shows_the_end_of_what_it_said(tmp_path):
    config = tmp_path / "wrong.yml"
    config.write_text("raise SystemExit('\\n'.join(f'line {n}' for n in range(100)))")
    with pytest.raises(
        RuntimeError, match=r"could not merge .*wrong\.yml \(exit status 1"
    ) as failure:
        merge_with_mergekit(sys.executable, config, tmp_path / "out")
    assert str(failure.value).split("\n")[1:] == [f"line {n}" for n in range(80, 100)]


def test_an_interpreter_without_mergekit_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no mergekit-yaml"):
        run_demo(tmp_path / "demo", SMALL, output())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "demo"),
        (["--version"], 0, "mergekit-metagpt, version"),
        (["demo", "--help"], 0, "Example: mergekit-metagpt demo"),
        (["demo", "one", "two"], 2, "unexpected extra argument"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_help_and_wrong_usage_import_neither_torch_nor_mergekit(words, status, said):
    script = (
        "import sys; from mergekit_metagpt.cli import main\n"
        f"try: main({words!r})\n"
        "finally: print({'torch', 'mergekit', 'transformers'} & {*sys.modules})\n"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert done.stdout.endswith("set()\n")
