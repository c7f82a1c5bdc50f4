"""``mergekit-metagpt coefficients``: the figures, and how people see them."""

import json

import numpy as np
import pytest
import reference
from conftest import (
    invoke,
    merge_config,
    put_nan,
    read,
    slices_config,
    write_yaml,
)


def measured(config, *words):
    return json.loads(invoke("coefficients", config, "--json", *words).stdout)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_json_holds_norms_coefficients_cosines_and_bounds(granularity, config, family):
    found = measured(config, "--granularity", granularity)
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    rows = reference.coefficients(base, experts, granularity)
    sizes = [base[name].numel() for name in rows] if granularity != "model" else None
    assert (found["base"], found["method"]) == (family["base"], "metagpt")
    assert found["granularity"] == [granularity]
    for t, expert in enumerate(found["experts"]):
        own = [row[t] for row in rows.values()]
        assert expert["model"] == family["ab"[t]]
        assert expert["squared_norm"] == pytest.approx(norms[t], rel=1e-6)
        assert expert["norm"] == pytest.approx(norms[t] ** 0.5, rel=1e-6)
        assert expert["coefficient"] == pytest.approx(np.average(own, weights=sizes), rel=1e-6)
        assert expert["least"] == pytest.approx(min(own), rel=1e-6)
        assert expert["largest"] == pytest.approx(max(own), rel=1e-6)
    assert found["cosines"][0][0] == pytest.approx(1)
    assert abs(found["cosines"][0][1]) < 0.1
    assert found["bound"]["metagpt"] == 1
    assert (found["bound"]["merge"] == pytest.approx(1)) == (granularity == "model")
    assert found["bound"].keys() == {"merge", "metagpt", "uniform", "0.3", "1.0"}
    assert found["tensors"] == len(base)
    assert found["parameters"] == sum(t.numel() for t in base.values())


def test_the_bound_of_this_merge_is_that_of_the_merged_model(family, merge, tmp_path):
    config = merge_config(family, parameters={"granularity": "tensor", "lambda": 0.8})
    config["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 9}, {"value": 1}]}
    found = measured(write_yaml(tmp_path / "metagpt.yml", config))
    base, *experts = map(read, family.values())
    average = {name: sum(expert[name] for expert in experts) / 2 for name in base}

    def distance(first, second):
        return sum((first[n].double() - second[n].double()).square().sum().item() for n in base)

    def bound(model):  # Σ_t ‖τ_t‖² ‖θ − θ_t‖², from the weights themselves
        return sum(distance(expert, base) * distance(model, expert) for expert in experts)

    ratio = found["bound"]["merge"] / found["bound"]["uniform"]
    assert ratio == pytest.approx(bound(merge(config)) / bound(average), rel=1e-5)


def test_a_sparsified_merge_has_no_bound_of_its_own(family, tmp_path):
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(family, "metagpt_ties"))
    assert "merge" not in measured(config)["bound"]
    assert "this merge" not in invoke("coefficients", config).stdout


BY_FILTER = [{"filter": "mlp", "value": 0.5}, {"value": 1}]


@pytest.mark.parametrize(("granularity", "weight"), [("tensor", 0.5), ("layer", BY_FILTER)])
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


def test_people_see_tables_and_a_picture(config, tmp_path):
    picture = tmp_path / "coefficients.png"
    output = invoke("coefficients", config, "--plot", picture).stdout
    for text in (
        "Scaling coefficients", "λ by layer", "Cosines of the task vectors",
        "bound on the average loss difference", "this merge", "least", "mean",
    ):  # fmt: skip
        assert text in output
    assert "▇" in output or "█" in output
    one_set = invoke("coefficients", config, "--granularity", "model").stdout
    assert not any(word in one_set for word in ("least", "by layer", "mean"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nan_is_one_sentence(own, tmp_path):
    put_nan(own["a"], "model.norm.weight")
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(own, anchors={"a": 1}))
    done = invoke("coefficients", config, status=1)
    *warnings, last = done.stderr.splitlines()
    # What MergeKit ignores does not hide it, and there is no progress bar without a terminal.
    assert all(line.startswith("Warning: ") for line in warnings)
    assert last.startswith(f"Error: Tensor model.norm.weight of model {own['a']} holds NaN")


def test_a_bad_config_is_one_sentence(family, tmp_path):
    for changes, sentence in (
        ({"merge_method": "linear"}, "linear has no coefficients to choose; set one of metagpt, "),
        ({"base_model": None}, "Merge method requires a base"),
    ):
        bad = write_yaml(tmp_path / "bad.yml", {**merge_config(family), **changes})
        assert sentence in invoke("coefficients", bad, status=1).stderr
