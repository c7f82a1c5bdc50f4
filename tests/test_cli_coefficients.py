"""``mergekit-metagpt coefficients`` and ``resolve``."""

import json
import sys

import pytest
import reference
import torch
import yaml
from click.testing import CliRunner
from conftest import (
    command,
    llama_config,
    merge_config,
    put_nan,
    read,
    run,
    save_family,
    write_yaml,
)

from mergekit_metagpt.cli import main
from mergekit_metagpt.method.session import SESSION


def invoke(*words, status: int = 0):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(tmp_path / "metagpt.yml", merge_config(family))


def measured(config, *words):
    return json.loads(invoke("coefficients", config, "--json", *words).stdout)


def test_json_holds_norms_shares_cosines_and_bounds(config, family):
    found = measured(config)
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    shares = norms / norms.sum()
    assert found["base"] == family["base"]
    assert found["method"] == "metagpt"
    assert found["granularity"] == "tensor"
    assert [e["model"] for e in found["experts"]] == [family["a"], family["b"]]
    assert [e["squared_norm"] for e in found["experts"]] == pytest.approx(norms, rel=1e-6)
    assert [e["norm"] for e in found["experts"]] == pytest.approx(norms**0.5, rel=1e-6)
    assert [e["coefficient"] for e in found["experts"]] == pytest.approx(shares, rel=1e-6)
    assert found["cosines"][0][0] == pytest.approx(1)
    assert abs(found["cosines"][0][1]) < 0.1
    assert found["bound"]["metagpt"] == 1
    assert min(found["bound"].values()) == 1
    assert found["bound"].keys() == {"metagpt", "uniform", "0.3", "1.0"}
    assert found["tensors"] == len(base)
    assert found["parameters"] == sum(t.numel() for t in base.values())


@pytest.mark.parametrize("granularity", ["tensor", "layer", "model"])
def test_what_it_prints_is_what_the_merge_uses(granularity, family, merge, tmp_path):
    changes = {
        "parameters": {"exponent": 1.0, "granularity": "tensor", "density": 0.5},
        "dtype": "bfloat16",
    }
    config = merge_config(family, "metagpt_ties", **changes)
    config["models"][0]["parameters"] = {"weight": 0.5}
    found = measured(write_yaml(tmp_path / "metagpt.yml", config), "--granularity", granularity)
    config["parameters"]["granularity"] = granularity
    with SESSION.journal() as entries:
        merge(config)
    if granularity == "model":
        assert found["groups"] == {}
        (used,) = {entry.coefficients for entry in entries}
        assert [e["coefficient"] for e in found["experts"]] == list(used)
    else:
        printed = found["groups"]
        for entry in entries:
            name = reference.scope(entry.tensor, granularity)
            assert printed[name] == list(entry.coefficients)


def test_people_see_tables(config):
    output = invoke("coefficients", config).stdout
    assert "Scaling coefficients" in output
    assert "Cosines of the task vectors" in output
    assert "bound on the average loss difference" in output
    assert "▇" in output or "█" in output


def test_the_plot_is_a_picture(config, tmp_path):
    invoke("coefficients", config, "--plot", tmp_path / "coefficients.png")
    assert (tmp_path / "coefficients.png").read_bytes().startswith(b"\x89PNG")
    failed = invoke("coefficients", config, "--plot", tmp_path / "coefficients.doc", status=1)
    assert "cannot be written as coefficients.doc" in failed.stderr


def test_a_dominant_expert_is_pointed_out(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.001, 0.1))
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    done = invoke("coefficients", config, "--json")
    assert "holds 100.0% of the merge" in done.stderr
    json.loads(done.stdout)


def test_an_expert_equal_to_the_base_is_pointed_out(family, tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.0))
    config = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    assert f"{paths['b']} is equal to the base" in invoke("coefficients", config).stderr


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
        ("merge_method: [", "bad.yml is not YAML (while parsing a flow node"),
        ("just text", "bad.yml is no mapping of keys to values; start from one of example_configs"),
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


def test_help_and_usage_errors_do_not_import_torch():
    program = """
import sys
from mergekit_metagpt.cli import main
for words in ("--help", "coefficients --help", "coefficients", "nonsense", "merge only-one"):
    try:
        main(words.split())
    except SystemExit:
        pass
sys.exit("torch" in sys.modules or "mergekit" in sys.modules)
"""
    assert run(sys.executable, "-c", program).returncode == 0


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
