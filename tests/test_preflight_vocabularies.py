"""Tokenizers that are broken or missing, and tokens that MergeKit has no row for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import llama_config, merge_config, save_family, save_tokenizer, write_yaml
from damages import overwrite, remove
from mergekit.common import ModelReference

from mergekit_metagpt.measure.vocabularies import tokenizers_agree
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.wording import BadInputError

WORDS = [f"w{number}" for number in range(64)]


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    """A family whose models have one tokenizer."""
    paths = save_family(tmp_path / "models", llama_config(num_hidden_layers=1))
    for path in paths.values():
        save_tokenizer(path, *WORDS)
    return paths


@pytest.fixture
def problems(own, tmp_path) -> Callable[..., list[str]]:
    """Check the merge of the family; return what is wrong."""

    def look(**changes: Any) -> list[str]:
        return inspect(str(write_yaml(tmp_path / "m.yml", merge_config(own, **changes)))).problems

    return look


BROKEN: dict[str, tuple[Callable[[str], Any], str]] = {
    "cut": (overwrite("tokenizer.json", b'{"a'), "(Unterminated string"),
    "without vocabulary": (remove("tokenizer.json"), "("),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_tokenizer_that_cannot_be_read_is_a_problem(how, own, problems):
    damage, said = BROKEN[how]
    name, tokenizer = ("base", None) if how == "cut" else ("b", {"source": "union"})
    damage(own[name])
    (problem,) = problems(tokenizer=tokenizer)
    assert problem.startswith(f"The tokenizer of model {own[name]} cannot be read (")
    assert said in problem
    assert "download" in problem
    pair = [ModelReference.model_validate(own[name]) for name in ("base", "b")]
    tokenizers_agree.cache_clear()
    with pytest.raises(BadInputError, match="cannot be read"):
        tokenizers_agree(*pair, None, False)


def test_a_model_without_a_tokenizer_is_skipped_but_for_the_base(own, problems):
    for name in ("b", "base"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            Path(own[name], file).unlink()
        assert problems() == []
    (problem,) = problems(tokenizer={"source": "union"})
    assert problem.startswith(f"The base {own['base']} has no tokenizer, and ")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "zero"}, None),
        ({"kind": "model_token", "model": "{a}", "token": "w3"}, None),
        (
            {"kind": "model_token", "model": "{a}", "token_id": 64},
            "Token ID 64 out of range",
        ),
        ("{a}", "Token 'new' not found in model"),
        ("/not/there", "Token 'new' requires a vocabulary weight from model"),
    ],
)
def test_a_new_token_needs_a_row_to_start_from(source, said, own, problems, merge):
    if isinstance(source, dict) and "model" in source:
        source = {**source, "model": own["a"]}
    source = own["a"] if source == "{a}" else source
    tokens = {"new": {"source": source}}
    found = problems(tokenizer={"source": "union", "tokens": tokens})
    config = merge_config(own, tokenizer={"source": "union", "tokens": tokens})
    if said is None:
        assert found == []
        assert len(merge(config)["lm_head.weight"]) == 65
    else:
        (problem,) = found
        assert "MergeKit cannot give every token of the merge a row of lm_head.weight" in problem
        assert said in problem
        with pytest.raises((AssertionError, ValueError, NotImplementedError)):
            merge(config)
    (problem,) = problems(tokenizer={"source": "base", "tokens": tokens})
    assert said or "'new' has none in /" in problem
