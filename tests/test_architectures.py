"""Architectures, each as a tiny randomly initialised checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from click.testing import CliRunner
from conftest import merge_config, read, save_family, write_yaml
from mergekit.scripts import merge_raw_pytorch, run_yaml
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
BERT = transformers.BertConfig(**SIZES)
GPT2 = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
MIXTRAL = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
T5 = transformers.T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    feed_forward_proj="gated-gelu",  # the one form of T5 that MergeKit describes
    tie_word_embeddings=False,
)  # fmt: skip


def mergekit(command: Any, config: dict[str, Any], directory: Path) -> Exception | None:
    """Run a command of MergeKit in this process; its output is directory / out."""
    yml = write_yaml(directory / "metagpt.yml", config)
    done = CliRunner().invoke(command, [str(yml), str(directory / "out"), "--quiet"])
    assert (done.exit_code == 0) == (done.exception is None)
    return done.exception


@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize(
    ("config", "auto"),
    [
        pytest.param(GPT2, AutoModelForCausalLM, id="GPT-2"),
        pytest.param(MIXTRAL, AutoModelForCausalLM, id="Mixtral"),
        pytest.param(BERT, AutoModelForSequenceClassification, id="BERT classifier"),
        pytest.param(T5, AutoModelForSeq2SeqLM, id="T5"),
    ],
)
def test_an_architecture_merges_and_loads(config, auto, granularity, tmp_path):
    paths = save_family(tmp_path, config, auto=auto)
    settings = merge_config(paths, parameters={"granularity": granularity})
    assert not mergekit(run_yaml.main, settings, tmp_path)
    model, loading = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]

    # Compared as transformers loads them: MergeKit writes some names another way.
    def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    base, *experts = (parameters(auto.from_pretrained(path)) for path in paths.values())
    expected = reference.coefficients(base, experts, granularity)
    reference.assert_merged(parameters(model), base, experts, expected)


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_bert_encoders_merge_with_mergekit_pytorch_where_mergekit_yaml_fails_on_any_method(
    granularity, tmp_path
):
    paths = save_family(tmp_path, BERT, auto=AutoModel)
    stock = merge_config(paths, "task_arithmetic", parameters={"weight": 0.5})
    ours = merge_config(paths, parameters={"granularity": granularity})
    fails = [repr(mergekit(run_yaml.main, config, tmp_path)) for config in (stock, ours)]
    assert fails[0] == fails[1] != "None"

    files = {name: str(Path(path, "model.safetensors")) for name, path in paths.items()}
    config = merge_config(files, parameters={"granularity": granularity})
    assert not mergekit(merge_raw_pytorch.main, config, tmp_path)
    base, *experts = map(read, paths.values())
    expected = reference.coefficients(base, experts, granularity)
    reference.assert_merged(read(tmp_path / "out"), base, experts, expected)
