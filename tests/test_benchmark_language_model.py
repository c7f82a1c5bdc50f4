"""`python -m benchmarks.language_model`, on a minuscule model and made-up data."""

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import llama_config
from paper_stand_ins import score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import results_file
from benchmarks.harness_tasks import Example
from benchmarks.language_model import __main__ as command
from benchmarks.language_model import ablation, measure
from benchmarks.language_model.ablation import DEFAULT, VARIANTS, Ablation
from benchmarks.language_model.base import make_base
from benchmarks.language_model.bench import Bench, Items
from benchmarks.language_model.by_rule import merge_by_rule
from benchmarks.language_model.experts import encoded
from benchmarks.language_model.measure import FamilyBench, LanguageFamily
from benchmarks.language_model.report import report
from benchmarks.language_model.rows import AVERAGE, DIRECTION, TUNED, Row
from benchmarks.language_model.rules import RULES
from benchmarks.language_model.tasks import splits
from benchmarks.quality.families import Score, expert_name

ITEMS = Items(validation=4, test=6, neutral=2)
TASKS: dict[str, dict[str, Any]] = {
    "add": {"source": {"sums": {"largest": 9}}, "prompt": "{first}+{second}", "answer": "sum"},
    "is it two": {
        "source": {"sums": {"largest": 9}},
        "prompt": "{second},{first}",
        "answer": "first",
        "answers": {"one": "no", "two": "yes"},
    },
}
BY_RULE = Row("TSV-M", "tsv_m", {})
FEW_ROWS = [AVERAGE, Row("MetaGPT, tensor", "metagpt", {}), TUNED, DIRECTION, BY_RULE]


def save_base(folder: Path) -> None:
    """Write a Llama that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokens), "num_hidden_layers": 1, "max_position_embeddings": 1024}
    config = llama_config(**sizes, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("language-model")
    save_base(work / "given")
    make_base(str(work / "given"), work / "base")
    return work


@pytest.fixture(scope="module")
def bench(work: Path) -> Bench:
    return Bench(work, TASKS, ITEMS)


@pytest.fixture(scope="module")
def family(bench: Bench) -> LanguageFamily:
    return FamilyBench(bench, "even", 0).results("tiny", FEW_ROWS)


def test_splits_are_disjoint_the_same_each_time_and_fair(tmp_path):
    first, second = (splits("add", TASKS["add"], tmp_path, 10, 20) for _ in range(2))
    assert first == second
    assert [len(split) for split in first] == [10, 20, 81 - 30]
    assert len({example.prompt for split in first for example in split}) == 81
    drawn = splits("is it two", TASKS["is it two"], tmp_path, 4, 6)
    for split, count in zip(drawn, (2, 3, 4), strict=True):
        assert Counter(example.answer for example in split) == {"yes": count, "no": count}
    with pytest.raises(click.ClickException, match=r"Task add needs more than 90 .* has 81\."):
        splits("add", TASKS["add"], tmp_path, 40, 50)


def test_only_answers_are_trained_on(work):
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "base")
    examples = [Example("ab", "cd"), Example("a", "bcd")]
    batch = encoded(tokenizer, examples, torch.device("cpu"))
    rows = zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True)
    for example, (ids, mask, labels) in zip(examples, rows, strict=True):
        assert tokenizer.decode(ids[mask == 1]) == f"{example.prompt} {example.answer}"
        assert tokenizer.decode(labels[labels >= 0]) == f" {example.answer}"
        assert labels[-1] >= 0  # all answers end in the last column


def test_every_model_is_scored_by_lm_eval(bench, family):
    merges = [row.name for row in FEW_ROWS]
    assert list(family.scores) == ["base", *map(expert_name, TASKS), *merges]
    assert family.perplexity.keys() == family.scores.keys()
    for task, examples in bench.splits.items():
        expected = score(bench.base, examples.test)
        assert family.scores["base"][task].loss == pytest.approx(expected.loss, rel=1e-4)
        assert family.scores["base"][task].accuracy == expected.accuracy
        assert family.gain(task) > 0
    best = min(family.grid, key=lambda weight: family.grid[weight])
    kept = bench.work / "scores/even-0-of-2/test" / f"{TUNED.name}.json"
    assert json.loads(kept.read_text())["settings"][0][1:3] == ["task_arithmetic", {"weight": best}]


def test_a_rule_writes_a_whole_checkpoint(bench, tmp_path):
    family, load = FamilyBench(bench, "even", 0), transformers.AutoModelForCausalLM.from_pretrained
    mean = RULES["tsv_m"]._replace(matrix=lambda taus: taus.mean(0))
    merge_by_rule(mean, family.task_vectors(), family.base, tmp_path / "merged", "cpu")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").decode([3]) == "!"
    experts = [load(expert.model.path).state_dict() for expert in family.experts.values()]
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        expected = sum(expert[name] for expert in experts) / len(experts)
        torch.testing.assert_close(tensor, expected)


def test_a_run_continues_where_it_stopped_with_variants_scored_as_merges_are(
    bench, family, monkeypatch
):
    first = FamilyBench(bench, "even", 0)
    losses = Ablation(first).losses()
    assert list(losses)[2:] == list(VARIANTS)
    for row, name in ((DIRECTION, DEFAULT), (AVERAGE, AVERAGE.name)):
        assert losses[name] == pytest.approx(first.validation_loss(row), rel=2e-3)

    def refuse(*arguments: object) -> None:
        raise AssertionError("this has been done before")

    monkeypatch.setattr(measure, "merge", refuse)
    monkeypatch.setattr(ablation, "load", refuse)
    again = FamilyBench(bench, "even", 0)
    assert again.results("tiny", FEW_ROWS) == family
    assert Ablation(again).losses() == losses
    with pytest.raises(AssertionError, match="done before"):
        again.results("tiny", [FEW_ROWS[0]._replace(parameters={"weight": 2.0})])


def test_the_report_says_what_wins_by_how_much_and_how_often():
    families = []
    for recipe, seed in product(("even", "uneven"), range(2)):
        losses = {"base": 9.0, "good": 1.0, "bad": 2.0 + seed}
        scores = {name: dict.fromkeys(TASKS, Score(50.0, loss)) for name, loss in losses.items()}
        scores |= {expert_name(task): {task: Score(100.0, 0.5)} for task in TASKS}
        norms, perplexity = dict.fromkeys(TASKS, 1.0), dict.fromkeys(scores, 30.0)
        families.append(LanguageFamily("tiny", recipe, seed, 1, norms, {}, scores, perplexity))
    text = report(families, ["good"])
    assert (
        "- **ALD:** good is best on average: 0.500, against 2.000 of bad, which it beats by "
        "1.500 ± 0.577. It is the best merge in 4 of 4 families."
    ) in text
    assert "| good | **0.500 ± 0.000** | **0.500 ± 0.000** | 4 |" in text
    assert "| bad | 4 of 4, -1.500 |" in text


@pytest.mark.parametrize(
    ("words", "said", "written"),
    [
        ([], "is best on average", ["ablation.md", "language_model.json", "language_model.md"]),
        (["--quick"], "is best on average", []),
        (["--ablation", "--recipe", "even"], f"\n| {DEFAULT} | ", []),
    ],
)
def test_only_the_full_run_replaces_the_results(words, said, written, work, tmp_path, monkeypatch):
    smaller = {"DEFINITIONS": TASKS, "QUICK_TASKS": tuple(TASKS), "Items": lambda: ITEMS}
    fewer = {"SEEDS": 1, "RECIPES": ["even"], "QUICK_RECIPE": "even", "rows_of": lambda _: FEW_ROWS}
    for name, value in {**smaller, **fewer}.items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    options = ["--work", str(work), "--base", str(work / "given"), *words]
    result = CliRunner().invoke(command.main, options, catch_exceptions=False)
    assert said in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    other = CliRunner().invoke(command.main, ["--work", str(work), "--base", "another"])
    assert other.exit_code == 2
    assert f"has experts of {work / 'given'}; give another --work" in other.output
