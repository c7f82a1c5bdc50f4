"""``granularity: direction`` in MergeKit's executor and in the commands."""

import json
import logging
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import (
    llama_config,
    merge_config,
    put_nan,
    read,
    save_family,
    slices_config,
    write_yaml,
)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch

from mergekit_metagpt.cli import main
from mergekit_metagpt.core.directions import Directions, Rule, merge_directions
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.method.advice import warnings
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.summary import Entry, Summary
from mergekit_metagpt.method.watch import Watch

SETTINGS = {"granularity": "direction", "exponent": 1.0}


def config_of(family, **parameters):
    return merge_config(family, parameters={"granularity": "direction", **parameters})


def invoke(*words, status=0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done


def assert_merged(merged, base, experts, rule, scale=1.0, roles=None):
    """Compare with the kernel; matrices are of linear layers, unless ``roles`` says otherwise."""
    for name, tensor in merged.items():
        default = Role.LINEAR if tensor.dim() > 1 else Role.ELEMENTS
        out = torch.empty_like(base[name])
        merge_directions(
            base[name],
            [expert[name] for expert in experts],
            rule,
            role=(roles or {}).get(name, default),
            name=name,
            scale=scale,
            out=out,
        )
        assert torch.equal(tensor, out), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoints_merge_tensor_by_tensor(dtype, merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.03, 0.02), dtype=dtype)
    config = merge_config(paths, parameters={**SETTINGS, "lambda": 0.9})
    for model, prior in zip(config["models"], (1.0, 0.5, 2.0), strict=True):
        model["parameters"] = {"weight": prior}
    base, *experts = map(read, paths.values())
    roles = {"model.embed_tokens.weight": Role.ROWS}
    assert_merged(merge(config), base, experts, Rule((1.0, 0.5, 2.0), 1.0), 0.9, roles)


def gpt2_config():
    return transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def test_gpt2_stores_its_inputs_as_rows(merge, tmp_path):
    paths = save_family(tmp_path, gpt2_config())
    base, *experts = map(read, paths.values())
    merged = merge(config_of(paths))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{name}.weight"
        rule = Rule((1.0, 1.0))
        assert_merged({name: merged[name]}, base, experts, rule, roles={name: Role.TRANSPOSED})


def by_yaml(family, config, tmp_path):
    out = tmp_path / "by-yaml"
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    return read(out)


def by_pytorch(family, config, tmp_path):
    files = {name: f"{path}/model.safetensors" for name, path in family.items()}
    yml = write_yaml(tmp_path / "raw.yml", merge_config(files, parameters=config["parameters"]))
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(tmp_path / "by-pytorch")])
    assert done.exit_code == 0, done.output
    return read(tmp_path / "by-pytorch")


def in_memory(family, config, tmp_path):
    models = {name: read(path) for name, path in family.items()}
    parameters = config["parameters"]
    return merge_state_dicts(models, "metagpt", base="base", parameters=parameters)


def as_modules(family, config, tmp_path):
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(path)
        for name, path in family.items()
    }
    parameters = config["parameters"]
    with torch.no_grad():
        return merge_state_dicts(models, "metagpt", base="base", parameters=parameters)


FAMILIES = {
    "Llama": llama_config(),
    "Llama with tied embeddings": llama_config(tie_word_embeddings=True),
    "GPT-2": gpt2_config(),
    "GPT-BigCode, which MergeKit guesses": transformers.GPTBigCodeConfig(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2
    ),
    "gpt-oss, whose experts are stacks": transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
}


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model", "direction"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_same_models_give_the_same_merge_by_every_entrance(architecture, granularity, tmp_path):
    family = save_family(tmp_path, FAMILIES[architecture])
    config = merge_config(family, parameters={"granularity": granularity})
    merged = by_yaml(family, config, tmp_path)
    for other in (by_pytorch, in_memory, as_modules):
        its = other(family, config, tmp_path)
        assert merged.keys() <= its.keys()
        for name, tensor in merged.items():
            assert torch.equal(its[name], tensor), (other, name)


def test_a_merge_with_more_layers_than_its_base_knows_its_inputs(merge, tmp_path):
    paths = save_family(tmp_path, gpt2_config())
    config = slices_config(paths, [[0, 2]], [[1, 2]], parameters={"granularity": "direction"})
    merged = merge(config)
    base, *experts = map(read, paths.values())
    for part in ("attn.c_proj", "mlp.c_fc"):
        source, name = (f"transformer.h.{n}.{part}.weight" for n in (1, 2))
        its = [{name: model[source]} for model in (base, *experts)]
        roles = {name: Role.TRANSPOSED}
        assert_merged({name: merged[name]}, its[0], its[1:], Rule((1.0, 1.0)), roles=roles)


def test_the_head_of_a_tied_model_is_merged_as_its_embedding_in_any_order():
    tables = [torch.randn(20, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    names = ("lm_head.weight", "model.embed_tokens.weight")
    found = [
        merge_state_dicts(
            [dict.fromkeys(order, table) for table in tables],
            "metagpt",
            base=0,
            parameters={"granularity": "direction"},
        )
        for order in (names, names[::-1])
    ]
    for name in names:
        assert torch.equal(found[0][name], found[1][names[0]])


def test_the_exponent_is_that_of_the_granularity(family, merge):
    found = merge(config_of(family))
    named = merge(config_of(family, exponent=0))
    squares = merge(config_of(family, exponent=2))
    assert all(torch.equal(found[name], named[name]) for name in found)
    assert any(not torch.equal(found[name], squares[name]) for name in found)


@pytest.mark.parametrize("setting", [{"isotropy": 0.01}, {"side": "both"}])
def test_parameters_of_earlier_versions_get_one_sentence(setting, family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family, **setting))
    (name,) = setting
    done = invoke("check", yml, status=1)
    (sentence,) = done.stderr.splitlines()
    assert f"Parameter {name} is gone" in sentence
    assert "remove it from the merge config" in sentence


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


def test_the_command_shows_what_the_merge_records(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    shown = json.loads(invoke("coefficients", yml, "--json", "--quiet").stdout)
    invoke("merge", yml, tmp_path / "merged", "--quiet")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    assert shown["granularity"] == record["granularity"] == ["direction"]
    assert shown["experts"] == record["experts"]
    assert shown["coefficients"] == record["coefficients"]
    assert shown["decided"] == record["decided"]
    assert 0 < shown["decided"][0] < shown["decided"][1]
    # Random task vectors are nearly orthogonal: numbers that sum to 1 would keep 1 of them.
    assert 1.2 < sum(expert["kept"] for expert in shown["experts"]) < 2
    assert shown["moved"] == pytest.approx(
        [e["norm"] / shown["experts"][0]["norm"] * shown["moved"][0] for e in shown["experts"]]
    )
    assert "--num-threads" in record["options"]  # the last bits of matrix products depend on it
    assert "granularity `direction`" in (tmp_path / "merged" / "README.md").read_text()


def test_the_table_and_the_plot_show_how_much_is_kept(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    plot = tmp_path / "coefficients.png"
    text = invoke("coefficients", yml, "--plot", plot, "--quiet").stdout
    assert "kept" in text
    assert "of 2 in all" in text
    assert "directions; elsewhere the experts are added up" in " ".join(text.split())
    assert "Moved, of the base's length: a " in text
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


def test_check_says_how_long_directions_take(family, tmp_path):
    yml = write_yaml(tmp_path / "metagpt.yml", config_of(family))
    assert "Arithmetic on this machine under 2 seconds" in " ".join(
        invoke("check", yml).stdout.replace("│", " ").split()
    )
    other = write_yaml(tmp_path / "tensor.yml", merge_config(family))
    assert "Arithmetic" not in invoke("check", other).stdout


def entry(
    tensor="w", norms=(1.0, 9.0), kept=(1.0, 1.0), length=None, size=4, exponent=0.0, scale=1.0
):
    found = Directions(norms, kept, sum(norms) if length is None else length, scale, 2, 4)
    return Entry(tensor, "direction", ("a", "b"), norms, (1.0, 1.0), exponent, size, found)


def test_an_expert_that_is_hardly_kept_is_named():
    (sentence,) = warnings(Summary([entry(kept=(0.04, 1.0), exponent=2.0)]))
    assert sentence.startswith("The merge keeps only 4.0% of the task vector of a; set exponent: 0")


def test_a_stretched_merge_is_warned_of():
    (sentence,) = warnings(Summary([entry(length=40.0)]))
    assert "moves 2.0 times as far as orthogonal experts would together" in sentence
    assert "set lambda: 0.5" in sentence


def test_a_large_lambda_is_no_stretch():
    assert not warnings(Summary([entry(length=40.0, scale=2.0, kept=(2.0, 2.0))]))


def test_a_small_lambda_is_no_small_share():
    small = entry(length=0.1, scale=0.1, kept=(0.1, 0.1))
    assert not warnings(Summary([small]))
    assert not list(Watch(parameters=1).add(small))


def test_an_expert_without_a_prior_is_not_missed():
    left_out = replace(entry(kept=(0.0, 1.0)), priors=(0.0, 1.0))
    assert not warnings(Summary([left_out]))
    assert not list(Watch(parameters=1).add(left_out))


def test_a_tensor_in_which_one_expert_moves_is_not_dominated():
    alone = Entry("w", "tensor", ("a", "b"), (1.0, 0.0), (1.0, 1.0), 2.0, 4)
    assert not list(Watch(parameters=1).add(alone))


def test_what_does_not_move_is_not_the_least_that_is_kept():
    experts = Summary([entry("u", (1.0, 0.0), (0.9, 0.0)), entry("w", kept=(0.8, 0.7))]).experts
    assert [(expert.least, expert.largest) for expert in experts] == [(0.8, 0.9), (0.7, 0.7)]


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


def test_an_adapter_is_merged_as_the_same_weights_that_were_merged_before(family, merge, tmp_path):
    spelled = save_adapters(family["base"], tmp_path)
    merged_before = []
    for name in ("a", "b"):
        model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
        whole = peft.PeftModel.from_pretrained(model, tmp_path / name).merge_and_unload()
        whole.save_pretrained(tmp_path / f"{name}-merged")
        merged_before.append(str(tmp_path / f"{name}-merged"))
    found = []
    for models in (spelled, merged_before):
        config = {**config_of(family), "models": [{"model": name} for name in models]}
        with SESSION.journal() as entries:
            found.append(merge(config, lora_merge_cache=str(tmp_path / "cache")))
        assert Summary(entries).stretch < 1.1
        assert not [w for w in warnings(Summary(entries)) if "times as far" in w]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-6)


def test_a_sum_of_experts_at_right_angles_has_stretch_1():
    entries = [
        entry("w", (1.0, 3.0)),
        replace(entry("v", (0.0, 0.0)), directions=None),
    ]
    assert Summary(entries).stretch == 1.0
    assert Summary([*entries, replace(entries[0], tensor="u", directions=None)]).stretch is None
    assert Summary(entries[1:]).stretch is None


def test_what_is_kept_is_weighted_by_what_was_moved():
    rows = [((1.0, 4.0), (1.0, 0.5)), ((3.0, 0.0), (0.2, 0.0))]
    summary = Summary(entry(f"layers.{n}.w", *row) for n, row in enumerate(rows))
    assert [expert.kept for expert in summary.experts] == pytest.approx([0.4, 0.5])
    first, second = summary.kept_by_layer
    assert first == [1.0, 0.5]
    assert second == pytest.approx([0.2, 0.0])
    assert summary.decided == (4, 8)


def test_the_journal_of_a_stock_merge_is_complete(family, merge):
    with SESSION.journal() as entries:
        merged = merge(config_of(family))
    assert {entry.tensor for entry in entries} == set(merged)
    assert all(entry.directions for entry in entries)


# What the stock command says


def warned(caplog, config, tmp_path):
    with caplog.at_level(logging.WARNING, "mergekit_metagpt"):
        by_yaml(None, config, tmp_path)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def uneven(tmp_path):
    return save_family(tmp_path, llama_config(), scales=(0.01, 0.2))


def test_the_stock_command_warns_once_of_an_expert_that_dominates(tmp_path, caplog):
    for granularity in ("tensor", "layer"):
        caplog.clear()
        folder = tmp_path / granularity
        config = merge_config(uneven(folder), parameters={"granularity": granularity})
        (sentence,) = warned(caplog, config, folder)
        assert sentence.startswith("In tensors with at least a tenth of the parameters, ")
        assert f"{folder}/b has more than 90%" in sentence
        assert "set exponent: 1" in sentence


def test_the_stock_command_warns_once_of_an_expert_that_is_hardly_kept(tmp_path, caplog):
    config = config_of(uneven(tmp_path), exponent=6)
    for model, prior in zip(config["models"], (1e-4, 1.0), strict=True):
        model["parameters"] = {"weight": prior}
    (sentence,) = warned(caplog, config, tmp_path)
    assert f"keeps less than 10% of the task vector of {tmp_path}/a" in sentence


def test_the_stock_command_is_quiet_about_a_sound_merge(family, tmp_path, caplog):
    assert not warned(caplog, config_of(family), tmp_path)


def test_a_warning_waits_for_a_tenth_of_the_parameters():
    watch = Watch(parameters=100)
    stretched = entry(length=40.0, size=6)
    assert not list(watch.add(stretched))
    (sentence,) = watch.add(stretched)
    assert "moves more than 1.5 times as far" in sentence
    assert not list(watch.add(stretched))
