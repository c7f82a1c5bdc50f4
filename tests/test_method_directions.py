"""``granularity: direction`` in MergeKit's executor and in the commands."""

import json

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import (
    checkpoints,
    edit,
    invoke,
    llama_config,
    lora,
    merge_config,
    put_nan,
    read,
    save_family,
    slices_config,
    write_yaml,
)
from mergekit.merge_methods import merge_state_dicts
from mergekit.scripts import merge_raw_pytorch

import mergekit_metagpt
from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.roles import Role
from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.provider import StoredModels
from mergekit_metagpt.method.advice import warnings
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.summary import Summary

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def config_of(family, **parameters):
    return merge_config(family, parameters={"granularity": "direction", **parameters})


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


def test_checkpoints_merge_tensor_by_tensor(merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), (0.01, 0.03, 0.02), dtype=torch.bfloat16)
    config = config_of(paths, exponent=1.0, **{"lambda": 0.9})
    for model, prior in zip(config["models"], (1.0, 0.5, 2.0), strict=True):
        model["parameters"] = {"weight": prior}
    base, *experts = map(read, paths.values())
    roles = {"model.embed_tokens.weight": Role.ROWS}
    assert_merged(merge(config), base, experts, Rule((1.0, 0.5, 2.0), 1.0), 0.9, roles)


OF_GPT = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
GPT2 = transformers.GPT2Config(**OF_GPT)

FAMILIES = {
    "Llama": llama_config(),
    "Llama with tied embeddings": llama_config(tie_word_embeddings=True),
    "GPT-2": GPT2,
    "GPT-BigCode, which MergeKit guesses": transformers.GPTBigCodeConfig(**OF_GPT),
    "gpt-oss, whose experts are stacks": transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=3,
        num_experts_per_tok=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        *((kind, "direction") for kind in FAMILIES),
        *(("Llama with tied embeddings", g) for g in ("tensor", "layer", "model")),
    ],
)
def test_the_same_models_give_the_same_merge_by_every_entrance(kind, granularity, merge, tmp_path):
    kind, parameters = save_family(tmp_path, FAMILIES[kind]), {"granularity": granularity}
    merged = merge(merge_config(kind, parameters=parameters))

    files = {name: f"{path}/model.safetensors" for name, path in kind.items()}
    yml = write_yaml(tmp_path / "raw.yml", merge_config(files, parameters=parameters))
    out = tmp_path / "by-pytorch"
    done = CliRunner().invoke(merge_raw_pytorch.main, [str(yml), str(out)])
    assert done.exit_code == 0, done.output

    others = [read(out)]
    for load in (read, transformers.AutoModelForCausalLM.from_pretrained):
        models = {name: load(path) for name, path in kind.items()}
        with torch.no_grad():
            others.append(merge_state_dicts(models, "metagpt", base="base", parameters=parameters))
    for its in others:
        assert merged.keys() <= its.keys()
        assert all(torch.equal(its[name], tensor) for name, tensor in merged.items())


def test_gpt2_stores_its_inputs_as_rows_also_in_layers_that_its_base_has_not(merge, tmp_path):
    paths = save_family(tmp_path, GPT2)
    base, *experts = map(read, paths.values())
    parameters = {"granularity": "direction"}
    merged = merge(slices_config(paths, [[0, 2]], [[1, 2]], parameters=parameters))
    for layer in (1, 2):
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            source, name = (f"transformer.h.{n}.{part}.weight" for n in (1, layer))
            its, *others = ({name: model[source]} for model in (base, *experts))
            roles = {name: Role.TRANSPOSED}
            assert_merged({name: merged[name]}, its, others, Rule((1.0, 1.0)), roles=roles)


@pytest.mark.parametrize("storing", [["base", "a", "b"], ["base"], ["a", "b"], ["b"]])
def test_a_head_that_is_the_embeddings_is_merged_as_them_also_if_models_store_both(
    storing, merge, tmp_path
):
    paths = save_family(tmp_path, llama_config(tie_word_embeddings=True))
    once = merge(config_of(paths))
    for name in storing:
        edit(paths[name], lambda tensors: tensors.update({HEAD: tensors[TABLE].clone()}))
    mergekit_metagpt.merge(config_of(paths), tmp_path / "out")
    twice, loaded = read(tmp_path / "out"), [read(path) for path in paths.values()]
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())
    assert torch.equal(twice[HEAD], twice[TABLE])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    if len(storing) == len(paths):
        parameters = {"granularity": "direction"}
        in_memory = merge_state_dicts(loaded, "metagpt", base=0, parameters=parameters)
        assert all(torch.equal(in_memory[name], tensor) for name, tensor in twice.items())


def test_embeddings_that_are_stored_once_are_not_read_to_find_a_head(tmp_path, monkeypatch):
    paths = save_family(tmp_path, llama_config(tie_word_embeddings=True))
    monkeypatch.setattr(Checkpoints, "load", None)
    assert StoredModels(checkpoints(paths), quiet=True).twins == {}


def test_a_plan_is_that_of_the_merge_also_where_the_caller_has_torch_round_products(family):
    expected = mergekit_metagpt.plan(config_of(family)).as_json()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mergekit_metagpt.plan(config_of(family)).as_json() == expected


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


def test_the_exponent_is_that_of_the_granularity_and_the_order_does_not_matter(family, merge):
    config = config_of(family)
    with noted() as entries:
        found = merge(config)
    assert {entry.tensor for entry in entries} == set(found)
    assert all(entry.directions for entry in entries)
    turned = {**config, "models": config["models"][::-1]}
    for same in (config_of(family, exponent=0), turned):
        merged = merge(same)
        assert all(torch.equal(found[name], merged[name]) for name in found)
    squares = merge(config_of(family, exponent=2))
    assert any(not torch.equal(found[name], squares[name]) for name in found)


def test_bad_numbers_and_results_are_refused_by_name(merge, tmp_path):
    paths = save_family(tmp_path, llama_config(), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        merge(config_of(paths, **{"lambda": 1e9}))
    put_nan(paths["b"], "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of model .*/b "):
        merge(config_of(paths))


def test_the_commands_show_what_is_kept_and_the_merge_records_it(family, tmp_path):
    yml, plot = write_yaml(tmp_path / "metagpt.yml", config_of(family)), tmp_path / "kept.png"
    shown = json.loads(invoke("coefficients", yml, "--json", "--quiet").stdout)
    invoke("merge", yml, tmp_path / "merged", "--quiet")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    assert shown["granularity"] == ["direction"]
    for figure in ("granularity", "experts", "coefficients", "decided"):
        assert shown[figure] == record[figure]
    assert 0 < shown["decided"][0] < shown["decided"][1]
    # Random task vectors are nearly orthogonal: numbers that sum to 1 would keep 1 of them.
    assert 1.2 < sum(expert["kept"] for expert in shown["experts"]) < 2
    assert shown["moved"] == pytest.approx(
        [e["norm"] / shown["experts"][0]["norm"] * shown["moved"][0] for e in shown["experts"]]
    )
    assert "--num-threads" in record["options"]  # the last bits of matrix products depend on it
    assert "granularity `direction`" in (tmp_path / "merged" / "README.md").read_text()

    def words(text):
        return " ".join(text.replace("│", " ").split())

    text = words(invoke("coefficients", yml, "--plot", plot, "--quiet").stdout)
    for said in (
        "kept", "of 2 in all", "directions; elsewhere the experts are added up",
        "Moved, of the base's length: a ", "granularity direction, exponent 0",
    ):  # fmt: skip
        assert said in text
    assert plot.stat().st_size > 10_000
    assert "Arithmetic on this machine 0:00:01 (h:mm:ss)" in words(invoke("check", yml).stdout)
    refused = invoke("resolve", yml, status=1)
    assert "cannot express granularity: direction" in refused.stderr


def test_what_numbers_keep_is_shown_where_it_has_a_meaning(family, tmp_path):
    # λ and what is kept have no mean.
    granularity = [{"filter": "mlp", "value": "direction"}, {"value": "model"}]
    mixed = write_yaml(tmp_path / "mixed.yml", config_of(family, granularity=granularity))
    assert "kept" not in invoke("coefficients", mixed, "--quiet").stdout

    # For orthogonal task vectors, what numbers keep is the coefficient itself.
    config = config_of(family, granularity="model", **{"lambda": 0.5})
    yml = write_yaml(tmp_path / "model.yml", config)
    for expert in json.loads(invoke("coefficients", yml, "--json", "--quiet").stdout)["experts"]:
        assert expert["kept"] == pytest.approx(expert["coefficient"] / 2, abs=0.02)
    assert "Arithmetic" not in invoke("check", yml).stdout


def test_an_adapter_is_merged_as_the_same_weights_that_were_merged_before(family, merge, tmp_path):
    """Of two adapters that read nearly the same inputs, as those from one seed do."""
    spelled, merged_before, found = [], [], []
    for number, name in enumerate(("a", "b"), 1):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
        adapted = peft.get_peft_model(model, lora(target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(number)
        for key, weights in adapted.state_dict().items():
            if "lora_A" in key:
                weights += 0.01 * torch.randn(weights.shape)
            if "lora_B" in key:
                weights.normal_()
        adapted.save_pretrained(tmp_path / name)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
        spelled.append(f"{family['base']}+{tmp_path / name}")
        merged_before.append(str(tmp_path / f"{name}-merged"))
    for models in (spelled, merged_before):
        config = {**config_of(family), "models": [{"model": name} for name in models]}
        with noted() as entries:
            found.append(merge(config, lora_merge_cache=str(tmp_path / "cache")))
        assert Summary(entries).stretch < 1.1
        assert not [w for w in warnings(Summary(entries)) if "times as far" in w]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-6)
