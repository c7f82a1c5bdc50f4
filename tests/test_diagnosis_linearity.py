"""Property 5: the outputs on the line between a base and an expert."""

import hashlib
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, checkpoints, llama_config, save_adapter, save_family
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.diagnosis import linearity
from mergekit_metagpt.diagnosis.linearity import (
    ALPHAS,
    Linearity,
    incomparable,
    interpolated,
    load,
    logits,
    measure_linearity,
)

PROMPTS = list(torch.randint(VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(0)))


def measured(paths: dict[str, str], **options: Any) -> list[Linearity]:
    its = checkpoints(paths)
    survey = its.survey(progress=False)
    return measure_linearity(its.base, survey, PROMPTS, MergeOptions(**options))


def loaded(paths: dict[str, str], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Load the base as the model to run, then every model of a family, in this dtype."""
    names = ["base", *paths]
    return [load(ModelReference.parse(paths[n]), dtype, MergeOptions()) for n in names]


def of(*outputs: list[float]) -> Linearity:
    """Return outputs of one prompt, each given for all α."""
    return Linearity(torch.tensor(outputs, dtype=torch.float64).T[:, None])


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
MIXTRAL = transformers.MixtralConfig(  # its files have one tensor per expert, which are fused
    **SMALL, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4
)


@pytest.mark.parametrize(
    ("config", "dtype", "shards"),
    [
        (llama_config(), torch.float32, {"max_shard_size": "20KB"}),
        (llama_config(tie_word_embeddings=True), torch.bfloat16, {}),
        (MIXTRAL, torch.bfloat16, {}),
    ],
)
def test_the_ends_are_the_base_and_the_expert_bit_for_bit(config, dtype, shards, tmp_path):
    paths = save_family(tmp_path, config, scales=(0.02,), dtype=dtype, **shards)
    model, *_ = loaded(paths)
    _, base, expert = loaded(paths, dtype)
    ends = []
    for alpha, name in ((0.0, "base"), (1.0, "a")):
        interpolated(model, base, expert, 0.4, ())
        ends.append(logits(interpolated(model, base, expert, alpha, ()), PROMPTS))
        whole = transformers.AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32)
        assert torch.equal(ends[-1], logits(whole.eval(), PROMPTS))
    # Followed are the tokens that both find likely.
    tokens = (ends[0] + ends[1]).argsort(descending=True)[:, :16]
    (line,) = measured(paths)
    for followed, end in zip((line.outputs[0], line.outputs[-1]), ends, strict=True):
        assert torch.equal(followed, end.gather(-1, tokens).double())


def test_in_between_lies_the_weighted_mean_and_what_overflows_is_refused(family):
    model, base, expert, _ = loaded(family)
    interpolated(model, base, expert, 0.3, ("model.norm.weight",))
    for (name, parameter), start, end in zip(
        model.named_parameters(), base.parameters(), expert.parameters(), strict=True
    ):
        expected = start if name == "model.norm.weight" else 0.7 * start + 0.3 * end
        torch.testing.assert_close(parameter, expected)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="overflow"):
        logits(model, PROMPTS)


def test_a_lora_is_an_expert(family, tmp_path):
    lora = save_adapter(family["base"], tmp_path / "lora")
    options = {"lora_merge_cache": str(tmp_path / "cache"), "lora_merge_dtype": "float32"}
    LoaderCache().setup(MergeOptions(**options))
    paths = {"base": family["base"], "lora": f"{family['base']}+{lora}"}
    (line,) = measured(paths, **options)
    assert line.movement > 0.01


def test_what_cannot_be_compared_stays_at_the_bases_or_is_refused(family, tmp_path):
    _, base, expert, _ = loaded(family)
    assert incomparable(base, expert) == []
    assert incomparable(base, expert, ["embed_tokens.weight"]) == ["model.embed_tokens.weight"]
    assert incomparable(base, expert, ["tokens.weight"]) == []
    tied = save_family(tmp_path / "tied", llama_config(tie_word_embeddings=True), scales=())
    _, base = loaded({"base": tied["base"]})  # which has no head of its own
    problem = r"^Parameter lm_head.weight is missing from .*/tied/base or .*, or tied .* there;"
    with pytest.raises(ValueError, match=problem):
        incomparable(base, expert)


def test_r_squared_is_the_documented_one_and_pools_before_it_divides():
    curve = [alpha**2 for alpha in ALPHAS]
    misfit = sum((z - alpha) ** 2 for z, alpha in zip(curve, ALPHAS, strict=True))
    spread = sum((z - math.fsum(curve) / 11) ** 2 for z in curve)
    assert of(curve).r_squared == pytest.approx(1 - misfit / spread)
    assert of(curve).movement == 1
    # The R² of this output alone is far below 0. It hardly moves, so it must hardly count.
    noise = [1e-3 * (-1) ** step for step in range(11)]
    assert of([10 * alpha for alpha in ALPHAS], noise).r_squared == pytest.approx(1, abs=1e-6)
    for rest in (0.0, 1e-6):
        still = of([1 + rest * alpha for alpha in ALPHAS])
        assert still.r_squared is None


def test_long_task_vectors_are_less_linear_and_one_expert_is_open_at_a_time(tmp_path, monkeypatch):
    paths = save_family(tmp_path, llama_config(), scales=(0.0002, 0.02, 0.05))
    alive, counts = weakref.WeakSet[Any](), []

    def counting(*arguments: Any) -> Any:
        model = load(*arguments)
        alive.add(model)
        counts.append(len(alive))
        return model

    monkeypatch.setattr(linearity, "load", counting)
    small, _, large = measured(paths)
    assert 0.99 < small.r_squared < 1
    assert large.r_squared < 0.9
    assert counts == [1, 2, 3, 3, 3]  # the running model, the base, and one expert


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_base_and_expert_are_mapped_files_which_stay_as_they_are(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.1,), dtype=torch.bfloat16)
    files = [Path(path, "model.safetensors") for path in paths.values()]
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    runs, base, expert = loaded(paths, torch.bfloat16)
    areas = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(files[0]))
    ]
    for parameter in base.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in areas)
    # The running model is changed in place. This must not change the file.
    interpolated(runs, base, expert, 0.5, ())
    assert not torch.equal(runs.lm_head.weight, base.lm_head.weight)
    assert before == [hashlib.sha256(file.read_bytes()).digest() for file in files]
