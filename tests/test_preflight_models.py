"""Experts that compute otherwise than the base, or whose tokens mean something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    invoke,
    merge_config,
    problems_of,
    save_tokenizer,
    the_only,
    write_yaml,
)
from damages import overwrite, remove
from mergekit.common import ModelReference

from mergekit_metagpt.measure.vocabularies import tokenizers_agree
from mergekit_metagpt.preflight import Preflight, inspect
from mergekit_metagpt.wording import BadInputError

ROPE = "rope_parameters"


@pytest.fixture
def look(own, tmp_path) -> Any:
    """Change the config of an expert, and check the merge."""

    def look(**changes: Any) -> tuple[Path, Preflight]:
        file = Path(own["b"], "config.json")
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value != ""}))
        yml = write_yaml(tmp_path / "merge.yml", merge_config(own))
        return yml, inspect(str(yml))

    return look


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads (8, not 4), so that tensors of one"),
        ({"num_key_value_heads": 4}, "num_key_value_heads (4, not 2), so that"),
        ({"head_dim": 16}, "head_dim (16, not 8), so that"),
    ],
)
def test_other_heads_of_the_same_shape_are_refused(changes, said, look, own):
    problems = look(**changes)[1].problems
    the_only(problems, f"The config.json of model {own['b']} differs from that of", said)


def test_other_heads_are_refused_of_models_with_code_of_their_own(own, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    code = "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    for name, path in own.items():
        Path(path, "code.py").write_text(code)
        config = json.loads(Path(path, "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}
        config["num_attention_heads"] = 8 if name == "b" else 4
        Path(path, "config.json").write_text(json.dumps(config))
    problems = problems_of(merge_config(own), tmp_path, trust_remote_code=True)
    the_only(problems, own["b"], "num_attention_heads (8, not 4)")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ROPE: {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta (500000.0, not 10000.0)"),
        ({ROPE: "", "rope_theta": 1e6}, "rope_theta (1000000.0, not 10000.0)"),
        (
            {ROPE: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.factor (2.0, not unset), rope_parameters.rope_type (linear, not",
        ),
        ({"hidden_act": "gelu", "rms_norm_eps": 1e-5}, "hidden_act (gelu, not silu), rms_norm_eps"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0, not unset)"),
        # What computes alike is no matter.
        ({"head_dim": ""}, ""),
        ({"max_position_embeddings": 128, "use_cache": False, "eos_token_id": 5}, ""),
        ({ROPE: "", "rope_theta": 10000, "dtype": "float16"}, ""),
    ],
)
def test_other_arithmetic_is_a_warning_with_both_values(changes, said, look, own):
    yml, found = look(**changes)
    assert (found.problems, len(found.warnings)) == ([], bool(said))
    for warning in found.warnings:
        assert f"The config.json of model {own['b']} differs from that of {own['base']}" in warning
        assert said in warning
    assert invoke("check", yml).stderr == "".join(f"Warning: {it}\n" for it in found.warnings)


WORDS = [f"w{number}" for number in range(64)]


@pytest.fixture
def speaking(own) -> dict[str, str]:
    """A family whose models have one tokenizer."""
    for path in own.values():
        save_tokenizer(path, *WORDS)
    return own


@pytest.mark.parametrize(
    ("damage", "said", "name", "tokenizer"),
    [
        (overwrite("tokenizer.json", b'{"a'), "(Unterminated string", "base", None),
        (remove("tokenizer.json"), "(", "b", {"source": "union"}),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_a_problem(
    damage, said, name, tokenizer, speaking, tmp_path
):
    damage(speaking[name])
    problems = problems_of(merge_config(speaking, tokenizer=tokenizer), tmp_path)
    unread = f"The tokenizer of model {speaking[name]} cannot be read ("
    the_only(problems, unread, said, "download")
    pair = [ModelReference.model_validate(speaking[name]) for name in ("base", "b")]
    tokenizers_agree.cache_clear()
    with pytest.raises(BadInputError, match="cannot be read"):
        tokenizers_agree(*pair, None, False)


def test_a_model_without_a_tokenizer_is_skipped_but_for_the_base(speaking, tmp_path):
    for name in ("b", "base"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            Path(speaking[name], file).unlink()
        assert problems_of(merge_config(speaking), tmp_path) == []
    (problem,) = problems_of(merge_config(speaking, tokenizer={"source": "union"}), tmp_path)
    assert problem.startswith(f"The base {speaking['base']} has no tokenizer, and ")
    overwrite("tokenizer.json", b'{"a')(speaking["a"])
    pair = [ModelReference.model_validate(speaking[name]) for name in ("base", "a")]
    tokenizers_agree.cache_clear()
    assert tokenizers_agree(*pair, None, False)  # as MergeKit takes it


OF_A = {"kind": "model_token", "model": "{a}"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "zero"}, None),
        ({**OF_A, "token": "w3"}, None),
        ({**OF_A, "token_id": 64}, "Token ID 64 out of range"),
        ("{a}", "Token 'new' not found in model"),
        ("/not/there", "Token 'new' requires a vocabulary weight from model"),
    ],
)
def test_a_new_token_needs_a_row_to_start_from(source, said, speaking, tmp_path, merge):
    source = json.loads(json.dumps(source).replace("{a}", speaking["a"]))
    tokens = {"new": {"source": source}}
    config = merge_config(speaking, tokenizer={"source": "union", "tokens": tokens})
    found = problems_of(config, tmp_path)
    if said is None:
        assert found == []
        assert len(merge(config)["lm_head.weight"]) == 65
    else:
        why = "MergeKit cannot give every token of the merge a row of lm_head.weight"
        the_only(found, why, said)
        with pytest.raises((AssertionError, ValueError, NotImplementedError)):
            merge(config)
    config["tokenizer"]["source"] = "base"
    the_only(problems_of(config, tmp_path), said or "'new' has none in /")
