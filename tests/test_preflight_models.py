"""Experts whose config.json makes them compute otherwise than the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, merge_config, write_yaml

from mergekit_metagpt.preflight import Preflight, inspect

ROPE = "rope_parameters"


@pytest.fixture
def look(family, tmp_path) -> Any:
    """Change the config of an expert, and check the merge."""

    def look(**changes: Any) -> tuple[Path, Preflight]:
        paths = {**family, "b": str(tmp_path / "b")}
        shutil.copytree(family["b"], paths["b"])
        file = Path(paths["b"], "config.json")
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value != ""}))
        yml = write_yaml(tmp_path / "merge.yml", merge_config(paths))
        return yml, inspect(str(yml))

    return look


@pytest.mark.parametrize(
    ("changes", "said", "expected"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads: 8", 4),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4", 2),
        ({"head_dim": 16}, "head_dim: 16", 8),
    ],
)
def test_other_heads_of_the_same_shape_are_refused(changes, said, expected, look, tmp_path):
    (problem,) = look(**changes)[1].problems
    assert f"The config.json of model {tmp_path / 'b'} says {said}, but that of" in problem
    assert f"/base says {expected}, so that tensors of one shape mean different" in problem


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
    ],
)
def test_other_arithmetic_is_a_warning_with_both_values(changes, said, look, tmp_path):
    yml, found = look(**changes)
    assert (found.problems, len(found.warnings)) == ([], 1)
    assert f"The config.json of model {tmp_path / 'b'} differs from that of" in found.warnings[0]
    assert said in found.warnings[0]
    assert invoke("check", yml).stderr == f"Warning: {found.warnings[0]}\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": ""},
        {"max_position_embeddings": 128, "use_cache": False, "eos_token_id": 5, "dtype": "float16"},
        {ROPE: "", "rope_theta": 10000},
    ],
)
def test_what_computes_alike_is_no_matter(changes, look):
    found = look(**changes)[1]
    assert (found.problems, found.warnings) == ([], [])
