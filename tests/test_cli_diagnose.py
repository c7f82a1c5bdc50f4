"""``mergekit-metagpt diagnose``, run in this process as a user would."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import VOCABULARY, llama_config, merge_config, save_family, slices_config, write_yaml
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from mergekit_metagpt.cli import main
from mergekit_metagpt.cli.diagnose import _cosines_verdict


def diagnose(config: Path, *words: str | Path) -> Result:
    return CliRunner().invoke(main, ["diagnose", str(config), *map(str, words)])


def failure(done: Result) -> str:
    """Return the one sentence that a command failed with."""
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    return lines[-1]


@pytest.fixture
def config(family, tmp_path):
    """The config of a merge of the family's two experts."""
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


def save_directions(directory: Path, directions: list[list[float]]) -> dict[str, str]:
    """Write a base and an expert per direction: multiples of two orthogonal task vectors."""
    paths = save_family(directory, llama_config(), scales=())
    first, second = (torch.zeros(VOCABULARY, 32) for _ in range(2))
    first[:, ::2], second[:, 1::2] = 0.01, 0.01
    for name, (a, b) in zip("abcdefgh", directions, strict=False):
        model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
        with torch.no_grad():
            model.lm_head.weight += a * first + b * second
        paths[name] = str(directory / name)
        model.save_pretrained(paths[name])
    return paths


def save_tokenizer(model: str, size: int = VOCABULARY, prefix: str = "w") -> None:
    words = {f"{prefix}{number}": number for number in range(size)}
    unknown = f"{prefix}{size - 1}"
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(model)


def test_it_shows_r_squared_and_cosines_and_what_they_mean(config):
    done = diagnose(config)
    assert done.exit_code == 0, done.output
    assert "Prompts: 8 prompts of random token ids (seed 0), since no tokenizer" in done.output
    assert re.search(r"\ba +0\.\d{4} +\d+\.\d% +\d", done.output)
    assert "b: not in the linear regime (R² under 0.95)." in done.output
    assert "Nearly orthogonal: no |cosine| of two experts reaches 0.1" in done.output
    assert not done.stderr  # no progress bar where there is no terminal


def test_linear_models_are_in_the_linear_regime(tmp_path):
    paths = save_directions(tmp_path, [[1, 0], [0, 2]])
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert done.exit_code == 0, done.output
    assert "In the linear regime (every R² is at least 0.95)" in done.output
    assert done.output.count("1.0000") == 2


def test_cosines_of_parallel_opposite_and_orthogonal_experts(tmp_path):
    paths = save_directions(tmp_path, [[1, 0], [3, 0], [-2, 0], [0, 1]])
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert done.exit_code == 0, done.output
    assert re.search(r"1 +a +1\.00 +1\.00 +-1\.00 +0\.00", done.output)
    assert "Not orthogonal" in done.output


@pytest.mark.parametrize(
    ("cosine", "verdict"),
    [
        (
            0.5,
            "Not orthogonal: a and b share a direction (cosine 0.50). The coefficients are still",
        ),
        (-0.5, "Not orthogonal: a and b undo each other in part (cosine -0.50)."),
        (0.09, "Nearly orthogonal"),
        (-0.09, "Nearly orthogonal"),
    ],
)
def test_what_a_cosine_means(cosine, verdict):
    assert _cosines_verdict(["a", "b"], [[1, cosine], [cosine, 1]]).startswith(verdict)


def test_an_expert_equal_to_the_base_has_no_r_squared(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.0,))
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert done.exit_code == 0, done.output
    assert "a: the outputs do not move by more than rounding" in done.output
    assert "nan" not in done.output
    assert "With one expert there is no pair to compare." in done.output


@pytest.mark.parametrize("prompts", [None, "w1 w2 w3\n\nw4\nw5 Grüße 東京\n"])
def test_prompts_are_tokenised_with_the_bases_tokenizer(prompts, tmp_path):
    paths = save_family(tmp_path, llama_config())
    save_tokenizer(paths["base"])
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    words: list[Any] = []
    if prompts is not None:
        (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
        words = ["--prompts", tmp_path / "prompts.txt"]
    done = diagnose(config, *words)
    assert done.exit_code == 0, done.output
    source = f"3 prompts from {tmp_path / 'prompts.txt'}" if prompts else "8 built-in prompts"
    assert f"Prompts: {source}." in done.output


def test_different_vocabularies_stay_at_the_bases_and_it_says_so(family, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(family["a"])
    model.resize_token_embeddings(72)
    model.save_pretrained(tmp_path / "bigger")
    paths = {**family, "a": str(tmp_path / "bigger")}
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert done.exit_code == 0, done.output
    assert (
        "model.embed_tokens.weight, lm_head.weight: the vocabulary of bigger differs" in done.output
    )
    assert "the vocabulary of b differs" not in done.output


def test_only_the_expert_whose_tokens_differ_is_named(tmp_path):
    paths = save_family(tmp_path, llama_config())
    for name in ("base", "a"):
        save_tokenizer(paths[name])
    save_tokenizer(paths["b"], prefix="v")
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert done.exit_code == 0, done.output
    assert "the vocabulary of b differs" in done.output
    assert "the vocabulary of a differs" not in done.output


def test_a_bare_adapter_is_told_to_be_written_after_its_base(family, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    paths = {**family, "b": str(tmp_path / "adapter")}
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert f"such as base+{paths['b']}." in failure(diagnose(config))
    done = CliRunner().invoke(main, ["check", str(config)])
    assert f"Model {paths['b']} is a LoRA adapter" in done.stderr


def test_slices_and_other_methods_will_do(family, tmp_path):
    config = slices_config(family, [[0, 2]], [[2, 3]], merge_method="ties")
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", config))
    assert done.exit_code == 0, done.output
    assert re.search(r"1 +a +1\.00 ", done.output)


def test_plot_writes_a_picture(config, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "assumptions.png"
    done = diagnose(config, "--plot", picture, "--quiet")
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 10_000
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plots_that_cannot_be_written_are_refused_before_any_work(config, tmp_path):
    pytest.importorskip("matplotlib")
    assert "name it plot.png." in failure(diagnose(config, "--plot", tmp_path / "plot.xyz"))
    missing = tmp_path / "missing" / "plot.png"
    assert f"The directory of {missing} does not exist" in failure(
        diagnose(config, "--plot", missing)
    )


def test_without_matplotlib_plot_says_what_to_install(config, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    done = diagnose(config, "--plot", "plot.png")
    assert failure(done).endswith(" pip install 'mergekit-metagpt[plot]'")
    assert not done.stdout


@pytest.mark.parametrize(
    ("architecture", "auto", "name"),
    [
        (
            transformers.BertConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
            ),
            AutoModelForMaskedLM,
            "BertForMaskedLM",
        ),
        (
            transformers.T5Config(
                vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
            ),
            AutoModelForSeq2SeqLM,
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_models_without_a_next_token_are_refused(architecture, auto, name, tmp_path):
    paths = save_family(tmp_path, architecture, auto=auto)
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert f"is a {name}, which yields no logits of a next token" in failure(done)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "holds no prompts; write one prompt per line."),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"w1 w2", "No tokenizer could be loaded for"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(text, sentence, config, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(text)
    assert sentence in failure(diagnose(config, "--prompts", tmp_path / "prompts.txt"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    paths = save_family(tmp_path, llama_config())
    save_tokenizer(paths["base"], size=VOCABULARY + 1)
    done = diagnose(write_yaml(tmp_path / "metagpt.yml", merge_config(paths)))
    assert "does not fit the model, which knows 64 tokens" in failure(done)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_model": None}, "names none; set base_model."),
        ({"models": []}, "names no model beside the base; add the experts."),
        ({"models": 3}, "is wrong at models: input should be a valid list; correct it."),
    ],
)
def test_configs_without_task_vectors_are_refused(changes, sentence, family, tmp_path):
    config = merge_config(family, **changes)
    if changes.get("models") == []:
        config["models"] = [{"model": family["base"]}]
    assert sentence in failure(diagnose(write_yaml(tmp_path / "metagpt.yml", config)))


def test_a_missing_model_is_one_sentence_and_verbose_shows_the_traceback(family, tmp_path):
    paths = {**family, "b": str(tmp_path / "missing")}
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert "missing" in failure(diagnose(config))
    assert not isinstance(diagnose(config, "--verbose").exception, SystemExit)


@pytest.mark.parametrize("words", [["nowhere.yml"], ["--prompts", "nowhere.txt"], ["--plott"], []])
def test_wrong_usage_exits_2(words):
    done = CliRunner().invoke(main, ["diagnose", *words])
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_help_shows_an_example_and_imports_neither_torch_nor_mergekit():
    script = """
import sys
from mergekit_metagpt.cli import main
from mergekit_metagpt.cli.diagnose import _cosines_verdict
try:
    main(["diagnose", *sys.argv[1:]])
except SystemExit as end:
    loaded = {"torch", "mergekit", "transformers", "matplotlib"} & set(sys.modules)
    assert not loaded, loaded
"""
    for words in (["--help"], ["nowhere.yml"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert ("mergekit-metagpt diagnose metagpt.yml" in done.stdout) == (words == ["--help"])
