"""Merge configs of strangers: each merges to the right numbers, or gets the right sentence.

They are in stranger_configs.yml. The numbers come from another place than this package: priors and
densities from MergeKit's planner, norms from numpy, and what is kept of a task vector from
MergeKit's stock method, with λ as its weights.
"""

from pathlib import Path
from string import Template

import click
import numpy as np
import pytest
import reference
import torch
import transformers
import yaml
from click.testing import CliRunner
from conftest import llama_config, lora, read, save_adapter, save_family, save_tokenizer
from mergekit import merge_methods
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from mergekit.scripts.multimerge import main as mergekit_multi

import mergekit_metagpt
from mergekit_metagpt.planning.config import read_config
from mergekit_metagpt.planning.job import with_own_adapters
from mergekit_metagpt.planning.planner import Planner, TensorMerge
from mergekit_metagpt.preflight import inspect
from mergekit_metagpt.wording import BadInputError

FILE = Path(__file__).parent / "stranger_configs.yml"
STRANGERS: list[dict[str, str]] = list(filter(None, yaml.safe_load_all(FILE.read_text("utf-8"))))
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, **HEADS}
EACH = ("density", "gamma")  # the parameters of each expert besides its prior
WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 64))]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
SOME = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.3.mlp.down_proj", "model.norm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, three experts of it, an adapter; one with new tokens, two that do not belong."""
    place = tmp_path_factory.mktemp("strangers")
    paths = save_family(place, llama_config(**SIZES), scales=(0.01, 0.03, 0.02))
    found = dict(zip(("base", "math", "code", "chat"), paths.values(), strict=True))
    for name, path in found.items():
        template = {"chat_template": "{{ messages }}"} if name == "chat" else {}
        save_tokenizer(path, *WORDS, **ENDS, **template)
    others = {
        "bigger": llama_config(**SIZES, vocab_size=66),
        "deeper": llama_config(**{**SIZES, "num_hidden_layers": 5}),
        "qwen": transformers.Qwen2Config(vocab_size=64, **SIZES),
    }
    for name, config in others.items():
        found[name] = save_family(place / name, config, scales=())["base"]
        more = ["<|im_start|>", "<|im_end|>"] if name == "bigger" else []
        save_tokenizer(found[name], *WORDS, *more, **ENDS)
    found |= {name: str(place / name) for name in ("lora", "cache")}
    save_adapter(found["base"], place / "lora", lora(target_modules=["q_proj", "up_proj"]))
    return found


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger["name"])
def test_strangers(stranger, models, tmp_path, request):
    if "pending" in stranger:
        request.applymarker(pytest.mark.xfail(reason=stranger["pending"]))
    yml, out = tmp_path / "config.yml", tmp_path / "out"
    text = Template(stranger["config"]).substitute(models)
    yml.write_bytes(text.encode())
    options = MergeOptions(
        quiet=True, lora_merge_cache=models["cache"], random_seed=3, write_model_card=False
    )
    if says := Template(stranger.get("says", "")).substitute(models):
        with pytest.raises(BadInputError) as refused:
            inspect(str(yml), str(out), options)
        assert any(says in problem for problem in refused.value.args), refused.value
    else:
        mergekit_metagpt.merge(yml, out, options=options)
        transformers.AutoModelForCausalLM.from_pretrained(out)
        assert_merged(yml, options, out)
    if stranger.get("tool") == "mergekit-multi":
        run(mergekit_multi, yml, "--intermediate-dir", tmp_path, "--out-path", out, "--quiet")
        for stage, made in zip(text.split("---"), (tmp_path / "step-one", out), strict=True):
            yml.write_text(stage.replace("model: step-one", f"model: {tmp_path / 'step-one'}"))
            assert_merged(yml, options, made)
    elif stranger.get("tool") == "mergekit-pytorch":
        run(mergekit_pytorch, yml, out, "--quiet")
        yml.write_text(text.replace("/model.safetensors", ""))
        assert_merged(yml, options, out)


def run(command: click.Command, *words: object) -> None:
    done = CliRunner().invoke(command, list(map(str, words)))
    assert done.exit_code == 0, done.output


def assert_merged(yml: Path, options: MergeOptions, out: Path) -> None:
    config, found = read_config(str(yml)).parse(), read(out)
    merges = Planner(config, with_own_adapters(options, config)).tensor_merges()
    checked = [merge for merge in merges if any(part in merge.name for part in SOME)]
    assert len(checked) > 2
    for merge in checked:
        expected = by_stock(merge)
        if expected is None:  # what is kept is drawn
            assert found[merge.name].isfinite().all()
            continue
        step = reference.rounding_step(expected, found[merge.name].dtype)
        wrong = abs(reference.as_float64(found[merge.name]) - expected) > 2 * step + 1e-6
        # Which of equal magnitudes is kept is left to the method.
        few = 0.02 if config.dtype in ("float16", "bfloat16") else 0
        assert wrong.mean() <= few, (merge.name, wrong.mean())


def by_stock(merge: TensorMerge) -> np.ndarray | None:
    """Merge one tensor by the stock method, with λ_t ∝ w_t ‖τ_t‖^k; None if it is random."""
    name = merge.task.method_name.removeprefix("metagpt").lstrip("_") or "task_arithmetic"
    if name.startswith(("dare", "della")):
        return None
    inputs, weights = {}, {}
    for model, load in merge.loads.items():
        loader = LoaderCache().get(model)
        dtype = dtype_from_name(load.dtype) or torch.float32
        inputs[model] = loader.get_tensor(load.tensor).to(dtype).double()
        weights[model] = {merge.name: inputs[model]}
        if merge.parameters["granularity"] != "tensor":
            weights[model] = {it: loader.get_tensor(it) for it in loader.index.tensor_paths}
    base, experts = weights.pop(merge.task.base_model), list(weights.values())
    priors = [merge.model_parameters[model]["weight"] for model in weights]
    granularity, k = (merge.parameters[key] for key in ("granularity", "exponent"))
    shares = reference.coefficients(base, experts, granularity, priors, 2.0 if k is None else k)
    of_tensor = shares.get(merge.name, next(iter(shares.values())))  # of the model: all the same
    each = {key: {m: merge.model_parameters[m].get(key) for m in weights} for key in EACH}
    entries = (
        TensorEntry(model, it, model == merge.task.base_model) for model, it in inputs.items()
    )
    settings = {**merge.parameters, **each, "weight": dict(zip(weights, of_tensor, strict=True))}
    merged = merge_methods.get(name).merge_group(TensorGroup(tuple(entries)), **settings)
    return reference.as_float64(merged)
