"""Experts that compute otherwise than the base, or whose tokens mean something else."""

import json

import pytest
from conftest import invoke, merge_config, problems_of, save_tokenizer, the_only, write_yaml
from damages import configure, overwrite, remove
from mergekit.common import ModelReference

from mergekit_metagpt.measure.vocabularies import tokenizers_agree
from mergekit_metagpt.wording import BadInputError

ROPE = "rope_parameters"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads (8, not 4), so that tensors of one"),
        ({"num_key_value_heads": 4}, "num_key_value_heads (4, not 2), so that"),
        ({"head_dim": 16}, "head_dim (16, not 8), so that"),
    ],
)
def test_other_heads_of_the_same_shape_are_refused(changes, said, own, tmp_path):
    configure(own["b"], **changes)
    problems = problems_of(merge_config(own), tmp_path)
    the_only(problems, f"The config.json of model {own['b']} differs from that of", said)


def test_other_heads_are_refused_of_models_with_code_of_their_own(own, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    code = (
        b"from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    for path in own.values():
        overwrite("code.py", code)(path)
        configure(path, model_type="own", auto_map={"AutoConfig": "code.Own"})
    configure(own["b"], num_attention_heads=8)
    problems = problems_of(merge_config(own), tmp_path, trust_remote_code=True)
    the_only(problems, own["b"], "num_attention_heads (8, not 4)")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ROPE: {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta (500000.0, not 10000.0)"),
        ({ROPE: None, "rope_theta": 1e6}, "rope_theta (1000000.0, not 10000.0)"),
        (
            {ROPE: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.factor (2.0, not unset), rope_parameters.rope_type (linear, not",
        ),
        ({"hidden_act": "gelu", "rms_norm_eps": 1e-5}, "hidden_act (gelu, not silu), rms_norm_eps"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0, not unset)"),
        # What computes alike is no matter.
        ({"head_dim": None}, ""),
        ({"max_position_embeddings": 128, "use_cache": False, "eos_token_id": 5}, ""),
        ({ROPE: None, "rope_theta": 10000, "dtype": "float16"}, ""),
    ],
)
def test_other_arithmetic_is_a_warning_with_both_values(changes, said, own, tmp_path):
    configure(own["b"], **changes)
    yml = write_yaml(tmp_path / "merge.yml", merge_config(own))
    warnings = invoke("check", yml).stderr.splitlines()
    assert len(warnings) == bool(said)
    start = f"Warning: The config.json of model {own['b']} differs from that of {own['base']}"
    assert all(it.startswith(start) and said in it for it in warnings)


WORDS = [f"w{number}" for number in range(64)]


@pytest.fixture
def speaking(own) -> dict[str, str]:
    """A family whose models have one tokenizer."""
    for path in own.values():
        save_tokenizer(path, *WORDS)
    return own


def assert_agree(paths: dict[str, str], *names: str) -> None:
    """Compare tokenizers as MergeKit's own command does, in a survey."""
    tokenizers_agree.cache_clear()
    pair = [ModelReference.model_validate(paths[name]) for name in names]
    assert tokenizers_agree(*pair, None, False)


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
    with pytest.raises(BadInputError, match="cannot be read"):
        assert_agree(speaking, "base", "b")


def test_a_model_without_a_tokenizer_is_skipped_but_for_the_base(speaking, tmp_path):
    for name in ("b", "base"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            remove(file)(speaking[name])
        assert problems_of(merge_config(speaking), tmp_path) == []
    problems = problems_of(merge_config(speaking, tokenizer={"source": "union"}), tmp_path)
    the_only(problems, f"The base {speaking['base']} has no tokenizer, and ")
    overwrite("tokenizer.json", b'{"a')(speaking["a"])
    assert_agree(speaking, "base", "a")  # as MergeKit takes it


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
