"""``mergekit-metagpt diagnose``, run in this process as a user would."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import (
    VOCABULARY,
    edit,
    invoke,
    llama_config,
    merge_config,
    save_family,
    save_tokenizer,
    slices_config,
    write_yaml,
)
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

SMALL = llama_config(num_hidden_layers=1)
WORDS = [f"w{number}" for number in range(VOCABULARY)]


def diagnose(config: Path, *words: object) -> str:
    return invoke("diagnose", config, *words).output


def failure(config: Path, *words: object) -> str:
    """Return the one sentence that a command failed with."""
    (line,) = invoke("diagnose", config, *words, status=1).stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def saved(folder: Path, config: Any = SMALL, **settings: Any) -> tuple[dict[str, str], Path]:
    """Write a family and a tokenizer of its base; return its paths, and a merge config."""
    paths = save_family(folder, config, **settings)
    save_tokenizer(paths["base"], *WORDS)
    return paths, write_yaml(folder / "metagpt.yml", merge_config(paths))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of a merge of two experts."""
    return saved(tmp_path_factory.mktemp("small"))[1]


def test_it_shows_r_squared_and_cosines_and_what_they_mean(config, tmp_path):
    picture = tmp_path / "assumptions.png"
    done = invoke("diagnose", config, "--plot", picture)
    assert "Prompts: 8." in done.output
    assert re.search(r"\bb +[0.]*\d{4} +no +\d", done.output)
    assert "Nearly orthogonal: the largest |cosine| of two experts is 0.0" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not done.stderr  # no progress bar where there is no terminal


def test_linear_models_and_cosines_of_parallel_opposite_and_orthogonal_experts(tmp_path):
    """Experts whose heads alone differ: by multiples of two orthogonal task vectors."""
    paths, config = saved(tmp_path, scales=(0.0,) * 4)
    for name, multiple, half in (("a", 1, 0), ("b", 3, 0), ("c", -2, 0), ("d", 1, 1)):
        edit(paths[name], lambda it, k=multiple, h=half: it["lm_head.weight"][:, h::2].add_(k / 99))
    said = diagnose(config)
    assert len(re.findall(r"1\.0000 +yes", said)) == 4
    assert re.search(r"1 +a +1\.00 +1\.00 +-1\.00 +0\.00", said)
    assert "Not orthogonal: the largest |cosine| of two experts is 1.00." in said


def test_an_expert_equal_to_the_base_has_no_r_squared(tmp_path):
    said = diagnose(saved(tmp_path, scales=(0.0,))[1])
    assert re.search(r"\ba +0\b", said)
    assert "nan" not in said
    assert "With one expert there is no pair to compare." in said


@pytest.mark.parametrize(
    ("prompts", "count"), [("w1 w2\n\nw4\nw5 Grüße 東京\n", 3), ("w1\n" * 40, 32)]
)
def test_up_to_32_prompts_are_taken_from_a_file(prompts, count, config, tmp_path):
    file = tmp_path / "prompts"
    file.write_text(prompts, encoding="utf-8")
    assert f"Prompts: {count} from {file}." in diagnose(config, "--prompts", file)


def test_only_an_expert_whose_vocabulary_differs_is_named(tmp_path):
    paths, config = saved(tmp_path, scales=(0.01, 0.02, 0.03))
    save_tokenizer(paths["a"], *WORDS)
    save_tokenizer(paths["b"], *WORDS[::-1])  # other tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["c"])
    model.resize_token_embeddings(72)  # another size
    model.save_pretrained(paths["c"])
    said = diagnose(config)
    named = re.findall(r"(.*): the vocabulary of (.) differs", said)
    assert named == [("model.embed_tokens.weight, lm_head.weight", name) for name in "bc"]


def test_slices_and_other_methods_will_do(tmp_path):
    paths, _ = saved(tmp_path, llama_config())
    config = slices_config(paths, [[0, 2]], [[2, 3]], merge_method="ties")
    assert re.search(r"1 +a +1\.00 ", diagnose(write_yaml(tmp_path / "metagpt.yml", config)))


def test_plots_that_cannot_be_written_are_refused_before_any_work(config, tmp_path, monkeypatch):
    assert "name it plot.png." in failure(config, "--plot", tmp_path / "plot.xyz")
    missing = tmp_path / "missing" / "plot.png"
    assert f"The directory of {missing} does not exist" in failure(config, "--plot", missing)
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    assert failure(config, "--plot", "plot.png").endswith(" pip install 'mergekit-metagpt[plot]'")


T5 = transformers.T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
)  # fmt: skip
BERT = transformers.BertConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


@pytest.mark.parametrize(
    ("architecture", "auto", "name"),
    [
        (BERT, AutoModelForMaskedLM, "BertForMaskedLM"),
        (T5, AutoModelForSeq2SeqLM, "T5ForConditionalGeneration"),
    ],
)
def test_models_without_a_next_token_are_refused(architecture, auto, name, tmp_path):
    paths = save_family(tmp_path, architecture, auto=auto, scales=(0.01,))
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert f"is a {name}, which yields no logits of a next token" in failure(config)


def test_prompts_and_tokenizers_that_cannot_be_used_are_refused(config, tmp_path):
    file = tmp_path / "prompts.txt"
    for text, sentence in (
        (b" \n", "holds no prompts; write one prompt per line."),
        (b"\xff\xfe", "is not UTF-8 text"),
    ):
        file.write_bytes(text)
        assert sentence in failure(config, "--prompts", file)
    paths = save_family(tmp_path, SMALL)
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert f"No tokenizer could be loaded for {paths['base']}; add" in failure(config)
    save_tokenizer(paths["base"], *WORDS, "the")  # that of another model
    assert "does not fit the model, which knows 64 tokens" in failure(config)


def test_configs_without_task_vectors_are_refused(family, tmp_path):
    adapter, not_there = tmp_path / "adapter", tmp_path / "not-there"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for changes, sentence in (
        ({"base_model": None}, "names none; set base_model."),
        ({"models": [{"model": family["base"]}]}, "names no model beside the base; add the"),
        ({"models": [{"model": str(not_there)}]}, f"{not_there} does not exist"),
        ({"models": [{"model": str(adapter)}]}, f"such as base+{adapter}."),
    ):
        config = write_yaml(tmp_path / "metagpt.yml", merge_config(family, **changes))
        assert sentence in failure(config)
    with pytest.raises(ValueError, match="adapter"):  # with its traceback
        invoke("diagnose", config, "--verbose", catch_exceptions=False)
