"""``mergekit-metagpt coefficients`` and ``resolve``."""

import json

import numpy as np
import pytest
import reference
import torch
import yaml
from conftest import (
    command,
    invoke,
    llama_config,
    merge_config,
    put_nan,
    read,
    run,
    save_family,
    slices_config,
    write_yaml,
)
from safetensors.torch import save_file

from mergekit_metagpt.method.notes import noted


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


def measured(config, *words):
    return json.loads(invoke("coefficients", config, "--json", *words).stdout)


def test_json_holds_norms_coefficients_cosines_and_bounds(config, family):
    found = measured(config, "--granularity", "model")
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    shares = norms / norms.sum()
    assert found["base"] == family["base"]
    assert found["method"] == "metagpt"
    assert found["granularity"] == ["model"]
    assert [e["model"] for e in found["experts"]] == [family["a"], family["b"]]
    assert [e["squared_norm"] for e in found["experts"]] == pytest.approx(norms, rel=1e-6)
    assert [e["norm"] for e in found["experts"]] == pytest.approx(norms**0.5, rel=1e-6)
    for key in ("coefficient", "least", "largest"):
        assert [e[key] for e in found["experts"]] == pytest.approx(shares, rel=1e-6)
    assert found["cosines"][0][0] == pytest.approx(1)
    assert abs(found["cosines"][0][1]) < 0.1
    assert found["bound"]["metagpt"] == 1
    assert found["bound"]["merge"] == pytest.approx(1)
    assert found["bound"].keys() == {"merge", "metagpt", "uniform", "0.3", "1.0"}
    assert found["tensors"] == len(base)
    assert found["parameters"] == sum(t.numel() for t in base.values())


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_an_expert_has_the_mean_least_and_largest_of_what_the_merge_uses(
    granularity, config, family
):
    found = measured(config, "--granularity", granularity)
    base, *experts = map(read, family.values())
    rows = reference.coefficients(base, experts, granularity)
    sizes = [base[name].numel() for name in rows]
    for t, expert in enumerate(found["experts"]):
        own = [row[t] for row in rows.values()]
        assert expert["coefficient"] == pytest.approx(np.average(own, weights=sizes), rel=1e-6)
        assert expert["least"] == pytest.approx(min(own), rel=1e-6)
        assert expert["largest"] == pytest.approx(max(own), rel=1e-6)


def test_the_bound_of_this_merge_is_that_of_the_merged_model(family, merge, tmp_path):
    config = merge_config(family, parameters={"granularity": "tensor", "lambda": 0.8})
    config["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 9}, {"value": 1}]}
    found = measured(write_yaml(tmp_path / "metagpt.yml", config))
    base, *experts = map(read, family.values())
    merged, average = merge(config), {n: sum(e[n] for e in experts) / 2 for n in base}
    assert found["bound"]["merge"] / found["bound"]["uniform"] == pytest.approx(
        _bound(merged, base, experts) / _bound(average, base, experts), rel=1e-5
    )


def _bound(merged, base, experts):
    """Σ_t ‖τ_t‖² ‖θ − θ_t‖², from the weights themselves."""

    def distance(first, second):
        return sum((first[n].double() - second[n].double()).square().sum().item() for n in base)

    return sum(distance(expert, base) * distance(merged, expert) for expert in experts)


def test_a_sparsified_merge_has_no_bound_of_its_own(family, tmp_path):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family, "metagpt_ties"))
    assert "merge" not in measured(config)["bound"]
    assert "this merge" not in invoke("coefficients", config).stdout


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
@pytest.mark.parametrize("weight", [0.5, [{"filter": "mlp", "value": 0.5}, {"value": 1}]])
def test_what_it_prints_is_what_the_record_and_the_card_of_the_merge_say(
    granularity, weight, family, tmp_path
):
    parameters = {"exponent": 1.0, "granularity": granularity, "density": 0.5}
    config = merge_config(family, "metagpt_ties", parameters=parameters, dtype="bfloat16")
    config["models"][0]["parameters"] = {"weight": weight}
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    found = measured(yml)
    done = invoke("merge", yml, tmp_path / "merged", "--no-copy-tokenizer")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    shared = found.keys() - {"moved", "cosines", "bound"}
    assert {key: record[key] for key in shared} == {key: found[key] for key in shared}
    card = (tmp_path / "merged" / "README.md").read_text()
    table = invoke("coefficients", yml).stdout
    for expert in found["experts"]:
        assert f" {expert['norm']:.6g} | {expert['coefficient']:.6g} |" in card
        assert f" {expert['coefficient']:.4f} " in table
        assert f" {expert['coefficient']:.4f} " in done.stdout


def test_the_coefficients_are_those_that_the_merge_uses(family, merge, tmp_path):
    config = merge_config(family, parameters={"granularity": "tensor"})
    found = measured(write_yaml(tmp_path / "metagpt.yml", config))["coefficients"]
    with noted() as entries:
        merge(config)
    assert {e.tensor: list(e.coefficients) for e in entries} == {
        name: scope["coefficients"] for name, scope in found.items()
    }


def test_where_priors_vary_within_a_layer_its_tensors_have_its_norms(family, tmp_path):
    config = merge_config(family, parameters={"granularity": "layer"})
    config["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.1}, {"value": 1}]}
    scopes = measured(write_yaml(tmp_path / "metagpt.yml", config))["coefficients"]
    base, *experts = map(read, family.values())
    norms = reference.squared_norms(base, experts)
    layer = "model.layers.0"
    expected = sum(row for name, row in norms.items() if name.startswith(layer))
    rows = [scope for scope in scopes.values() if scope["norms_of"] == layer]
    assert len(rows) == sum(name.startswith(layer) for name in norms)
    for row in rows:
        assert row["squared_norms"] == pytest.approx(expected, rel=1e-6)


def test_an_expert_that_has_no_part_in_a_slice_has_no_norm_there(family, tmp_path):
    config = slices_config(family, [[0, 1]], [[1, 3]])
    del config["slices"][1]["sources"][2]
    found = measured(write_yaml(tmp_path / "metagpt.yml", config))
    row = found["coefficients"]["model.layers.2.mlp.up_proj.weight"]
    assert row["squared_norms"][1] is None
    assert row["coefficients"] == [1.0, 0.0]
    assert found["experts"][1]["least"] == 0


def test_people_see_tables(config):
    output = invoke("coefficients", config).stdout
    assert "Scaling coefficients" in output
    assert "λ by layer" in output
    assert "Cosines of the task vectors" in output
    assert "bound on the average loss difference" in output
    assert "this merge" in output
    assert "▇" in output or "█" in output


def test_one_set_of_coefficients_has_no_least_and_no_layers(config):
    output = invoke("coefficients", config, "--granularity", "model").stdout
    assert "least" not in output
    assert "by layer" not in output
    assert "mean" not in output


def test_the_plot_is_a_picture(config, tmp_path):
    invoke("coefficients", config, "--plot", tmp_path / "coefficients.png")
    assert (tmp_path / "coefficients.png").read_bytes().startswith(b"\x89PNG")
    failed = invoke("coefficients", config, "--plot", tmp_path / "coefficients.doc", status=1)
    assert "cannot be written as coefficients.doc" in failed.stderr


def test_a_dominant_expert_is_pointed_out_with_what_another_exponent_gives(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1))
    config = write_yaml(
        tmp_path / "metagpt.yml", merge_config(paths, parameters={"granularity": "model"})
    )
    done = invoke("coefficients", config, "--json")
    milder = write_yaml(
        tmp_path / "milder.yml",
        merge_config(paths, parameters={"granularity": "model", "exponent": 1}),
    )
    means = [f"{e['coefficient']:.4f}" for e in measured(milder)["experts"]]
    share = json.loads(done.stdout)["experts"][1]["coefficient"]
    assert f"{paths['b']} has {share:.1%} of the merge" in done.stderr
    assert f"set exponent: 1, which gives {' / '.join(means)}, or give it a smaller" in done.stderr


def move(model: str, base: str, scales: dict[str, float]) -> None:
    """Make a model the base plus noise, of a scale by the layer's name, or of 0.001."""
    weights = read(base)
    for number, (name, tensor) in enumerate(sorted(weights.items())):
        scale = next((s for layer, s in scales.items() if layer in name), 0.001)
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        weights[name] = tensor + scale * noise
    save_file(weights, f"{model}/model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_experts_that_take_over_in_turn_are_pointed_out(granularity, tmp_path):
    """No mean is large, and over the whole model the shares are even."""
    paths = save_family(tmp_path, llama_config(num_hidden_layers=2, vocab_size=8))
    move(paths["a"], paths["base"], {"layers.0.": 0.05})
    move(paths["b"], paths["base"], {"layers.1.": 0.05})
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    done = invoke("coefficients", config, "--granularity", granularity)
    (warning,) = done.stderr.splitlines()
    shares = measured(config, "--granularity", "model")["experts"]
    assert "one expert has more than 90%" in warning
    assert "granularity: model, which gives " in warning
    assert f"{shares[0]['coefficient']:.4f} / {shares[1]['coefficient']:.4f}" in warning
    assert "set exponent: 0, which leaves 0%" in warning  # 1 would leave as many
    whole = invoke("coefficients", config, "--granularity", "model")
    assert whole.stderr == ""


def test_an_expert_equal_to_the_base_is_pointed_out(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.0))
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert f"{paths['b']} is equal to the base" in invoke("coefficients", config).stderr


def test_names_with_brackets_are_no_markup(tmp_path):
    paths = save_family(tmp_path / "[red]" / "[/x]", llama_config())
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert "[red]" in invoke("coefficients", config).stdout


def test_nan_is_one_sentence_and_a_traceback_only_with_verbose(tmp_path):
    paths = save_family(tmp_path, llama_config())
    put_nan(paths["a"], "model.norm.weight")
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    done = run(command("mergekit-metagpt"), "coefficients", config)
    assert done.returncode == 1
    assert f"Tensor model.norm.weight of model {paths['a']} holds NaN or Inf" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Measuring" not in done.stderr  # no progress bar: not a terminal


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("merge_method: [", "bad.yml is not YAML in line 1, column 16 (expected the node"),
        (
            "just text",
            "bad.yml is not a mapping of keys to values; start from one of example_configs",
        ),
        ("models: []", "bad.yml lacks merge_method; add it."),
        ("merge_method: linear\nmodels: [{model: x}]", "merge_method linear has no coefficients"),
    ],
)
def test_a_bad_config_is_one_sentence(text, sentence, tmp_path):
    config = tmp_path / "bad.yml"
    config.write_text(text)
    for name in ("coefficients", "resolve"):
        assert sentence in invoke(name, config, status=1).stderr


def test_a_merge_without_base_is_one_sentence(family, tmp_path):
    config = merge_config(family)
    del config["base_model"]
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    assert "base" in invoke("coefficients", yml, status=1).stderr


def test_wrong_usage_exits_with_2(config):
    invoke("coefficients", status=2)
    invoke("coefficients", "nowhere.yml", status=2)
    invoke("coefficients", config, "--granularity", "layers", status=2)
    invoke("coefficients", config, "--nonsense", status=2)


@pytest.mark.parametrize("name", ["coefficients", "resolve", "check", "merge", "diagnose", "demo"])
def test_help_shows_an_example(name):
    assert f"mergekit-metagpt {name}" in invoke(name, "--help").stdout.partition("Example:")[2]


def test_resolve_writes_yaml_that_stock_mergekit_merges_to_the_same_bytes(family, merge, tmp_path):
    config = merge_config(family, "metagpt_ties", parameters={"density": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    invoke("resolve", yml, "-o", tmp_path / "stock.yml")
    text = (tmp_path / "stock.yml").read_text()
    assert invoke("resolve", yml).stdout == text
    done = run(
        command("mergekit-yaml"), tmp_path / "stock.yml", tmp_path / "out", "--no-copy-tokenizer",
        MERGEKIT_METAGPT_AUTOLOAD="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, stock = merge(config), read(tmp_path / "out")
    assert all(torch.equal(ours[name], stock[name]) for name in ours)
    assert yaml.safe_load(text)["merge_method"] == "ties"


def test_priors_near_the_largest_number_are_relative_like_all_others(family, tmp_path):
    found = []
    for priors in ([2.0, 1.0], [1.6e308, 0.8e308]):
        config = merge_config(family)
        for model, prior in zip(config["models"], priors, strict=True):
            model["parameters"] = {"weight": prior}
        found.append(measured(write_yaml(tmp_path / "metagpt.yml", config)))
    shares = [[expert["coefficient"] for expert in one["experts"]] for one in found]
    assert shares[0] == pytest.approx(shares[1], rel=1e-12)
