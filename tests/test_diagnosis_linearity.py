"""Property 5: the outputs on the line between a base and an expert."""

import hashlib
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import VOCABULARY, llama_config, save_family
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.diagnosis import linearity, running
from mergekit_metagpt.diagnosis.linearity import (
    ALPHAS,
    Linearity,
    Probe,
    measure_linearity,
    sample_tokens,
)
from mergekit_metagpt.diagnosis.running import incomparable, interpolate, load
from mergekit_metagpt.measure.checkpoints import survey_checkpoints

Models = tuple[transformers.PreTrainedModel, ...]


def prompts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (4, 10), generator=generator))


def measured(paths: dict[str, str], **options: Any) -> list[Linearity]:
    base, *experts = paths.values()
    survey = survey_checkpoints(base, experts, progress=False)
    return measure_linearity(
        ModelReference.parse(base),
        survey,
        prompts(),
        options=MergeOptions(**options),
        progress=False,
    )


def edited(directory: Path, source: str, change: Callable[[Any], None]) -> str:
    """Write a changed copy of a model; return its path."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(directory)
    return str(directory)


def loaded(paths: dict[str, str], dtype: torch.dtype = torch.float32) -> Models:
    """Load the base as the model to run, then every model of a family, in this dtype."""
    names = ["base", *paths]
    return tuple(load(ModelReference.parse(paths[n]), dtype, MergeOptions()) for n in names)


def result(outputs: list[list[float]]) -> Linearity:
    """Return outputs at one place, from one list per α."""
    return Linearity(
        ModelReference.parse("expert"), torch.tensor(outputs, dtype=torch.float64)[:, None]
    )


def test_a_task_vector_in_the_head_alone_is_linear(family, tmp_path):
    def change(model: Any) -> None:
        model.lm_head.weight += 0.1 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )

    paths = {"base": family["base"], "a": edited(tmp_path / "a", family["base"], change)}
    (found,) = measured(paths)
    assert found.movement > 0.01
    assert found.r_squared == pytest.approx(1, abs=1e-6)
    assert found.largest_deviation < 1e-4


def test_the_longer_the_task_vector_the_less_linear(tmp_path):
    small, large = measured(save_family(tmp_path, llama_config(), scales=(0.0002, 0.05)))
    assert 0.99 < small.r_squared < 1
    assert large.r_squared < 0.9
    assert large.largest_deviation > 10 * small.largest_deviation


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("Llama", torch.float32),
        ("Llama", torch.bfloat16),
        ("tied Llama", torch.bfloat16),
        ("sharded Llama", torch.float32),
        ("Mixtral", torch.bfloat16),
    ],
)
def test_the_ends_are_the_base_and_the_expert_bit_for_bit(architecture, dtype, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
    config = {
        "tied Llama": llama_config(tie_word_embeddings=True),
        # The files have one tensor per expert, which transformers fuses.
        "Mixtral": transformers.MixtralConfig(
            **sizes,
            intermediate_size=48,
            num_hidden_layers=2,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
    }.get(architecture, llama_config())
    shards = {"max_shard_size": "20KB"} if architecture == "sharded Llama" else {}
    paths = save_family(tmp_path, config, scales=(0.02,), dtype=dtype, **shards)
    model, *_ = loaded(paths)
    _, base, expert = loaded(paths, dtype)
    probe = Probe.sample(prompts(), seed=0)
    for alpha, path in ((0.0, paths["base"]), (1.0, paths["a"])):
        interpolate(model, base, expert, 0.4)
        interpolate(model, base, expert, alpha)
        whole = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        assert torch.equal(probe.logits(model), probe.logits(whole))

    (found,) = measured(paths)
    tokens = sample_tokens(*(probe.logits(m.float()) for m in (base, expert)), seed=0)
    assert torch.equal(
        found.outputs[[0, -1]],
        torch.stack([probe.logits(m.float()).gather(-1, tokens) for m in (base, expert)]).double(),
    )


def test_in_between_lies_the_weighted_mean(family):
    model, base, expert, _ = loaded(family)
    interpolate(model, base, expert, 0.3, held=("model.norm.weight",))
    for (name, parameter), start, end in zip(
        model.named_parameters(), base.parameters(), expert.parameters(), strict=True
    ):
        expected = start if name == "model.norm.weight" else 0.7 * start + 0.3 * end
        torch.testing.assert_close(parameter, expected)


def test_a_lora_is_an_expert(family, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    options = {"lora_merge_cache": str(tmp_path / "cache"), "lora_merge_dtype": "float32"}
    LoaderCache().setup(MergeOptions(**options))
    paths = {"base": family["base"], "lora": f"{family['base']}+{tmp_path / 'lora'}"}
    (found,) = measured(paths, **options)
    assert found.movement > 0.01
    assert str(found.expert) == paths["lora"]


def test_a_vocabulary_of_another_size_stays_at_the_bases(family, tmp_path):
    bigger = edited(tmp_path / "a", family["a"], lambda m: m.resize_token_embeddings(72))
    (found,) = measured({"base": family["base"], "a": bigger})
    assert found.held == ("model.embed_tokens.weight", "lm_head.weight")
    assert found.movement > 0.01


def test_tensors_that_a_survey_left_out_stay_at_the_bases(family):
    _, base, expert, _ = loaded(family)
    assert incomparable(base, expert) == ()
    assert incomparable(base, expert, ["embed_tokens.weight"]) == ("model.embed_tokens.weight",)
    assert incomparable(base, expert, ["tokens.weight"]) == ()


def test_an_expert_with_a_head_of_its_own_does_not_fit_a_base_with_a_tied_one(tmp_path):
    tied = save_family(tmp_path / "tied", llama_config(tie_word_embeddings=True), scales=())
    free = save_family(tmp_path / "free", llama_config())
    _, base, expert = loaded({"base": tied["base"], "a": free["a"]})
    with pytest.raises(
        ValueError, match=r"^Parameter lm_head.weight of .*/free/a is .* tied .* there;"
    ):
        incomparable(base, expert)


def test_r_squared_pools_the_outputs_before_it_divides():
    line = [10 * alpha for alpha in ALPHAS]
    # The R² of this output alone is far below 0. It hardly moves, so it must hardly count.
    noise = [1e-3 * (-1) ** step for step in range(11)]
    found = result([[a, b] for a, b in zip(line, noise, strict=True)])
    assert found.r_squared == pytest.approx(1, abs=1e-6)
    assert result([[b] for b in noise]).movement == 0


def test_r_squared_and_the_largest_deviation_are_the_documented_ones():
    outputs = [alpha**2 for alpha in ALPHAS]
    mean = math.fsum(outputs) / 11
    misfit = sum((z - alpha) ** 2 for z, alpha in zip(outputs, ALPHAS, strict=True))
    found = result([[z] for z in outputs])
    assert found.r_squared == pytest.approx(1 - misfit / sum((z - mean) ** 2 for z in outputs))
    assert found.largest_deviation == pytest.approx(0.25)
    assert found.movement == 1


@pytest.mark.parametrize("movement", [0.0, 1e-6])
def test_outputs_that_do_not_move_have_no_r_squared(movement):
    found = result([[1 + movement * alpha] for alpha in ALPHAS])
    assert not found.moves
    assert math.isnan(found.r_squared)
    assert math.isnan(found.largest_deviation)


def test_a_probe_looks_at_distinct_places_and_follows_the_seed():
    long = [torch.arange(50) + number for number in range(40)]
    probe = Probe.sample(long, seed=1)
    assert len(probe.prompts) <= 16
    assert sum(map(len, probe.positions)) == 32
    assert all(len(set(at)) == len(at) for at in probe.positions)
    assert all(len(ids) == max(at) + 1 for ids, at in zip(*vars(probe).values(), strict=True))
    assert probe.positions == Probe.sample(long, seed=1).positions
    assert probe.positions != Probe.sample(long, seed=2).positions
    assert Probe.sample([torch.tensor([3])], seed=0).positions == ((0,),)


@pytest.mark.parametrize("vocabulary", [2, 4, 64])
def test_tokens_are_the_favourites_and_others(vocabulary):
    base, expert = torch.randn(2, 9, vocabulary, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(base, expert, seed=0)
    assert tokens.shape == (9, min(4, vocabulary))
    assert all(len(set(row)) == len(row) for row in tokens.tolist())
    assert torch.equal(tokens[:, 0], base.argmax(-1))
    agree = base.argmax(-1) == expert.argmax(-1)
    assert torch.equal(tokens[~agree, 1], expert.argmax(-1)[~agree])


def test_results_depend_on_the_seed_but_not_on_the_order_of_the_experts(family):
    first = {str(found.expert): found.outputs for found in measured(family)}
    turned = {name: family[name] for name in ("base", "b", "a")}
    for found in measured(turned):
        assert torch.equal(found.outputs, first[str(found.expert)])
    for found in measured(family, random_seed=7):
        assert not torch.equal(found.outputs, first[str(found.expert)])


def test_outputs_that_overflow_are_refused(family):
    model, *_ = loaded(family)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="overflow"):
        Probe.sample(prompts(), seed=0).logits(model)


def test_one_model_runs_and_one_expert_is_open_at_a_time(tmp_path, monkeypatch):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.02, 0.03))
    alive: list[weakref.ref[Any]] = []
    most = 0

    def counting(*arguments: Any) -> transformers.PreTrainedModel:
        nonlocal most
        model = load(*arguments)
        alive.append(weakref.ref(model))
        most = max(most, sum(reference() is not None for reference in alive))
        return model

    monkeypatch.setattr(linearity, "load", counting)
    measured(paths)
    assert len(alive) == 5
    assert most == 3  # the running model, the base, and one expert


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_base_and_expert_are_mapped_files_which_stay_as_they_are(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.1,), dtype=torch.bfloat16)
    files = [Path(path, "model.safetensors") for path in paths.values()]
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    model = load(ModelReference.parse(paths["base"]), torch.bfloat16, MergeOptions())
    areas = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(files[0]))
    ]
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in areas)

    # The running model is changed in place. This must not change the file.
    runs, base, expert = loaded(paths, torch.bfloat16)
    interpolate(runs, base, expert, 0.5)
    assert not torch.equal(runs.lm_head.weight, base.lm_head.weight)
    assert before == [hashlib.sha256(file.read_bytes()).digest() for file in files]


def test_loading_leaves_transformers_progress_bars_as_they_were(family):
    transformers.utils.logging.enable_progress_bar()  # another test may have switched them off
    running.load(ModelReference.parse(family["base"]), torch.float32, MergeOptions())
    assert transformers.utils.logging.is_progress_bar_enabled()
