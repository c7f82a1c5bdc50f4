"""``granularity: direction`` in MergeKit's executor and in the commands."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import llama_config, merge_config, put_nan, read, save_family, write_yaml
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts import merge_raw_pytorch

from mergekit_metagpt.cli import main
from mergekit_metagpt.core.directions import SIDES, Rule, merge_directions
from mergekit_metagpt.method.advice import warnings
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.preflight import costs

SETTINGS = {"granularity": "direction", "isotropy": 0.05, "side": "output", "exponent": 1.0}


def config_of(family, **parameters):
    return merge_config(family, parameters={"granularity": "direction", **parameters})


def invoke(*words, status=0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done


def assert_merged(merged, base, experts, rule, scale=1.0, vocabulary=()):
    for name, tensor in merged.items():
        axis = 0 if name in vocabulary else None
        others = [expert[name] for expert in experts]
        wanted = merge_directions(base[name], others, rule, scale=scale, vocabulary_axis=axis)
        assert torch.equal(tensor, wanted.merged), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoints_merge_tensor_by_tensor(dtype, merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.03, 0.02), dtype=dtype)
    config = merge_config(paths, parameters={**SETTINGS, "lambda": 0.9})
    for model, prior in zip(config["models"], (1.0, 0.5, 2.0), strict=True):
        model["parameters"] = {"weight": prior}
    base, *experts = map(read, paths.values())
    rule = Rule((1.0, 0.5, 2.0), 1.0, 0.05, "output")
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    assert_merged(merge(config), base, experts, rule, 0.9, vocabulary)


def test_a_transposed_layout_merges_as_its_other_side(merge, tmp_path):
    """GPT-2 stores its matrices transposed."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    paths = save_family(tmp_path, config)
    name = "transformer.h.1.mlp.c_fc.weight"
    base, *experts = (read(path)[name] for path in paths.values())
    merged = merge(config_of(paths, side="input"))[name]
    rule = Rule((1.0, 1.0), 0.0, 0.01, "output")
    turned = merge_directions(base.T, [e.T for e in experts], rule).merged.T
    torch.testing.assert_close(merged, turned)


def test_state_dicts_merge_in_memory():
    generator = torch.Generator().manual_seed(0)
    base, *experts = (
        {"layers.0.w": torch.randn(6, 4, generator=generator), "norm": torch.ones(4) * n}
        for n in range(3)
    )
    merged = merge_state_dicts([base, *experts], "metagpt", base=0, parameters=SETTINGS)
    assert_merged(merged, base, experts, Rule((1.0, 1.0), 1.0, 0.05, "output"))


def test_mergekit_pytorch_knows_no_vocabulary(family, tmp_path):
    files = {name: f"{path}/model.safetensors" for name, path in family.items()}
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(files, parameters=SETTINGS))
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    base, *experts = map(read, family.values())
    assert_merged(read(tmp_path / "out"), base, experts, Rule((1.0, 1.0), 1.0, 0.05, "output"))


def test_the_defaults_are_those_of_the_granularity(family, merge):
    found = merge(config_of(family))
    named = merge(config_of(family, isotropy=0.01, side="input", exponent=0))
    squares = merge(config_of(family, exponent=2))
    assert all(torch.equal(found[name], named[name]) for name in found)
    assert any(not torch.equal(found[name], squares[name]) for name in found)


def test_the_order_of_the_models_does_not_matter(family, merge):
    config = config_of(family)
    found = merge(config)
    turned = merge({**config, "models": config["models"][::-1]})
    assert all(torch.equal(found[name], turned[name]) for name in found)


def test_experts_that_equal_the_base_give_the_base(family, merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.0, 0.0))
    base = read(paths["base"])
    merged = merge(config_of(paths))
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_number_that_is_not_finite_is_named(merge, tmp_path):
    paths = save_family(tmp_path, llama_config())
    put_nan(paths["b"], "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of model .*/b "):
        merge(config_of(paths))


def test_a_result_that_overflows_is_refused(merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        merge(config_of(paths, **{"lambda": 1e9}))


@pytest.mark.parametrize("method", ["metagpt_ties", "metagpt_dare_linear"])
def test_the_sparsified_methods_refuse_it(method, family, merge):
    config = merge_config(family, method, parameters={"granularity": "direction"})
    with pytest.raises(
        ValueError, match=r"layer or model, not 'direction'.* merge_method: metagpt\."
    ):
        merge(config)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"isotropy": 1.5}, "isotropy must be a number from 0 to 1, not 1.5"),
        ({"isotropy": "none"}, "isotropy must be a number from 0 to 1, not 'none'"),
        ({"side": "left"}, "side must be output, input or both, not 'left'"),
    ],
)
def test_parameters_out_of_range_are_refused(setting, wanted, family, merge):
    with pytest.raises(ValueError, match=wanted):
        merge(config_of(family, **setting))


def test_the_command_shows_what_the_merge_records(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    shown = json.loads(invoke("coefficients", yml, "--json", "--quiet").stdout)
    invoke("merge", yml, tmp_path / "merged", "--quiet")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    assert shown["granularity"] == record["granularity"] == ["direction"]
    assert shown["experts"] == record["experts"]
    assert shown["coefficients"] == record["coefficients"]
    assert sum(expert["coefficient"] for expert in shown["experts"]) == pytest.approx(1)
    # Random task vectors are nearly orthogonal: numbers that sum to 1 would keep 1 of them.
    assert 1.2 < sum(expert["kept"] for expert in shown["experts"]) < 2
    assert "--num-threads" in record["options"]  # the last bits of matrix products depend on it
    assert "granularity `direction`" in (tmp_path / "merged" / "README.md").read_text()


def test_the_table_and_the_plot_show_how_much_is_kept(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    plot = tmp_path / "coefficients.png"
    text = invoke("coefficients", yml, "--plot", plot, "--quiet").stdout
    assert "kept" in text
    assert "of 2 in all" in text
    assert "granularity direction, exponent 0" in text
    assert plot.stat().st_size > 10_000


def test_numbers_say_how_much_they_keep_too(family, tmp_path):
    """For orthogonal task vectors, that is the coefficient itself."""
    config = merge_config(family, parameters={"granularity": "model", "lambda": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    shown = json.loads(invoke("coefficients", yml, "--json", "--quiet").stdout)
    for expert in shown["experts"]:
        assert expert["kept"] == pytest.approx(expert["coefficient"] / 2, abs=0.02)


def test_no_stock_config_can_express_it(family, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_metagpt.planning.measurements.Measurements.take", None)
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    done = invoke("resolve", yml, status=1)
    assert "cannot express granularity: direction" in done.stderr


def test_check_says_what_it_costs(family, tmp_path, monkeypatch):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    text = invoke("check", yml).stdout
    assert "Float64 operations" in text
    assert "GPU" not in text
    monkeypatch.setitem(costs.__globals__, "_MANY", 1)
    assert "a GPU with fast float64 (--device cuda) is advisable" in invoke("check", yml).stdout
    other = write_yaml(tmp_path / "tensor.yml", merge_config(family))
    assert "Float64" not in invoke("check", other).stdout


def test_an_expert_that_is_hardly_kept_is_named():
    entry = Entry(
        "w", "direction", ("a", "b"), (1.0, 9.0), (1.0, 1.0), 2.0, 4, (0.1, 0.9), (0.04, 1.0)
    )
    (sentence,) = warnings(Summary([entry]))
    assert sentence.startswith("The merge keeps only 4.0% of the task vector of a; set exponent: 0")


def save_adapters(base, folder):
    """Save two adapters that read nearly the same inputs, as those from one seed do."""
    targets = ["q_proj", "up_proj"]
    for number, name in enumerate(("a", "b"), 1):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        torch.manual_seed(number)
        for key, weights in adapted.state_dict().items():
            if "lora_A" in key:
                weights += 0.01 * torch.randn(weights.shape)
            if "lora_B" in key:
                weights.normal_()
        adapted.save_pretrained(folder / name)
    return [f"{base}+{folder / name}" for name in ("a", "b")]


def test_adapters_are_compared_on_both_sides(family, merge, tmp_path):
    models = [{"model": name} for name in save_adapters(family["base"], tmp_path)]
    name = "model.layers.0.self_attn.q_proj.weight"
    found = {}
    for side in (None, *SIDES):
        config = {**config_of(family, **({"side": side} if side else {})), "models": models}
        with SESSION.journal() as entries:
            tensor = merge(config, lora_merge_cache=str(tmp_path / "cache"))[name]
        found[side] = tensor, Summary(entries).stretch, warnings(Summary(entries))
    assert torch.equal(found[None][0], found["both"][0])
    assert not found[None][2]
    assert found[None][1] < 2 < found["input"][1]
    (sentence,) = found["input"][2]
    assert "times as far as unrelated experts would together" in sentence
    assert "set side: both" in sentence


def test_check_knows_that_adapters_are_compared_on_both_sides(family, tmp_path):
    models = [{"model": name} for name in save_adapters(family["base"], tmp_path)]
    cache = tmp_path / "cache"
    cache.mkdir()

    def operations(**side):
        config = {**config_of(family, **side), "models": models}
        yml = write_yaml(tmp_path / "metagpt.yml", config)
        text = invoke("check", yml, "--lora-merge-cache", cache).stdout
        (line,) = (line for line in text.splitlines() if "Float64 operations" in line)
        return line

    assert operations() == operations(side="both") != operations(side="input")


def test_a_sum_of_experts_at_right_angles_has_stretch_1():
    entries = [
        Entry(
            "w", "direction", ("a", "b"), (1.0, 3.0), (1.0, 1.0), 0.0, 4, (0.5, 0.5), (1, 1), 4.0
        ),
        Entry("v", "direction", ("a", "b"), (0.0, 0.0), (1.0, 1.0), 0.0, 4),
    ]
    assert Summary(entries).stretch == 1.0
    assert Summary([*entries, replace(entries[0], tensor="u", merged_norm=None)]).stretch is None
    assert Summary(entries[1:]).stretch is None


def test_what_is_kept_is_weighted_by_what_was_moved():
    rows = [((1.0, 4.0), (1.0, 0.5)), ((3.0, 0.0), (0.2, 0.0))]
    entries = [
        Entry(f"layers.{n}.w", "direction", ("a", "b"), norms, (1.0, 1.0), 0.0, 4, (0.5, 0.5), kept)
        for n, (norms, kept) in enumerate(rows)
    ]
    summary = Summary(entries)
    assert [expert.kept for expert in summary.experts] == pytest.approx([0.4, 0.5])
    first, second = summary.kept_by_layer
    assert first == [1.0, 0.5]
    assert second == pytest.approx([0.2, 0.0])


def test_the_journal_of_a_stock_merge_is_complete(family, merge):
    with SESSION.journal() as entries:
        merged = merge(config_of(family))
    assert {entry.tensor for entry in entries} == set(merged)
    assert all(sum(entry.coefficients) == pytest.approx(1) for entry in entries)
