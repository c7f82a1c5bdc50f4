"""``mergekit-metagpt merge``: whole or not at all, with a record."""

import json
import sys
from pathlib import Path

import pytest
import reference
import torch
from click.testing import CliRunner
from conftest import (
    command,
    llama_config,
    merge_config,
    on_posix,
    put_nan,
    read,
    run,
    save_family,
    write_yaml,
)
from huggingface_hub import ModelCard

from mergekit_metagpt.cli import main
from mergekit_metagpt.measure.identity import sha256_of

QUIET = ("--quiet", "--no-copy-tokenizer")


def merge(*words, status: int = 0):
    done = CliRunner().invoke(main, ["merge", *map(str, words), *QUIET])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def config(family, tmp_path):
    return write_yaml(
        tmp_path / "metagpt.yml", merge_config(family, parameters={"granularity": "model"})
    )


def test_it_merges_like_the_stock_command(config, family, tmp_path):
    merge(config, tmp_path / "new" / "merged")
    base, *experts = map(read, family.values())
    expected = reference.coefficients(base, experts, "model")
    reference.assert_merged(read(tmp_path / "new" / "merged"), base, experts, expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


def test_the_record_tells_inputs_and_coefficients(config, family, tmp_path):
    merge(config, tmp_path / "merged", "--random-seed", 5)
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    assert record["config"] == config.read_text()
    assert record["granularity"] == ["model"]
    assert record["seed"] == 5
    assert record["coefficients"]["model"]["squared_norms"] == pytest.approx(norms, rel=1e-6)
    shares = record["coefficients"]["model"]["coefficients"]
    assert shares == pytest.approx(norms / norms.sum(), rel=1e-6)
    assert {i["model"] for i in record["inputs"]} == set(family.values())
    (file,) = record["inputs"][0]["files"]
    path = Path(record["inputs"][0]["model"], file["name"])
    assert file["bytes"] == path.stat().st_size
    assert file["sha256"] == sha256_of(path)
    assert {"mergekit", "torch", "transformers", "mergekit-metagpt"} <= record["versions"].keys()
    assert record["times"].keys() == {"started", "finished"}


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_finer_granularities_are_recorded_scope_by_scope(granularity, family, tmp_path):
    config = merge_config(family, parameters={"granularity": granularity})
    merge(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    base, *experts = map(read, family.values())
    expected = {
        reference.scope(name, granularity): row
        for name, row in reference.coefficients(base, experts, granularity).items()
    }
    assert record["coefficients"].keys() == expected.keys()
    for name, row in expected.items():
        assert record["coefficients"][name]["coefficients"] == pytest.approx(row, rel=1e-6)
    norms = sum(reference.squared_norms(base, experts).values())
    found = [expert["squared_norm"] for expert in record["experts"]]
    assert found == pytest.approx(norms, rel=1e-6)


def test_a_record_shows_priors_that_vary_within_the_model(family, tmp_path):
    config = merge_config(family, parameters={"granularity": "model"})
    config["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.1}, {"value": 1}]}
    merge(write_yaml(tmp_path / "metagpt.yml", config), tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "metagpt.json").read_text())
    base, *experts = map(read, family.values())
    norms = sum(reference.squared_norms(base, experts).values())
    assert [e["squared_norm"] for e in record["experts"]] == pytest.approx(norms, rel=1e-6)
    assert len({tuple(r["coefficients"]) for r in record["coefficients"].values()}) == 2


def test_the_card_keeps_mergekits_text_and_gains_the_coefficients(config, family, tmp_path):
    merge(config, tmp_path / "my-merge", "--random-seed", 5)
    card = ModelCard.load(tmp_path / "my-merge" / "README.md")
    assert "# my-merge" in card.text
    assert "created using [mergekit]" in card.text
    assert "### Scaling coefficients" in card.text
    assert f"| {family['a']} | " in card.text
    assert "mergekit-yaml mergekit_config.yml merged --random-seed 5" in card.text
    assert {"mergekit", "merge", "metagpt-merge"} == set(card.data.tags)
    assert card.data.base_model_relation == "merge"


def test_two_runs_give_the_same_bytes_but_for_times(family, tmp_path):
    config = merge_config(family, "metagpt_dare_ties", parameters={"density": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    outs = [tmp_path / "one" / "m", tmp_path / "two" / "m"]
    for out, seed in zip(outs, ("1", "2"), strict=True):
        done = run(
            command("mergekit-metagpt"), "merge", yml, out, *QUIET, "--random-seed", 3,
            PYTHONHASHSEED=seed,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    first, second = ({p.name: p.read_bytes() for p in out.iterdir()} for out in outs)
    records = [json.loads(files.pop("metagpt.json")) for files in (first, second)]
    assert first == second
    assert [record.pop("times").keys() for record in records]
    assert records[0] == records[1]


def test_a_failure_leaves_nothing_behind(tmp_path):
    paths = save_family(tmp_path, llama_config())
    put_nan(paths["a"], "model.norm.weight")
    yml = write_yaml(tmp_path / "metagpt.yml", merge_config(paths))
    before = set(tmp_path.iterdir())
    assert "holds NaN or Inf" in merge(yml, tmp_path / "merged", status=1).stderr
    assert set(tmp_path.iterdir()) == before


def test_what_check_finds_stops_it_before_any_work(config, family, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "something").touch()
    text = config.read_text().replace("granularity", "granularty")
    config.write_text(text)
    before = set(tmp_path.iterdir())
    done = merge(config, tmp_path / "merged", status=1)
    assert "granularty" in done.stderr
    assert "not empty" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_base_without_a_tokenizer_is_one_sentence_and_no_progress_is_piped(config, tmp_path):
    done = run(command("mergekit-metagpt"), "merge", config, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "Failed to copy tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_sentence(config, tmp_path):
    assert "no cuda device here" in merge(config, tmp_path / "merged", "--cuda", status=1).stderr


KILLED = """
import contextlib, os, signal, sys, time
from pathlib import Path
from click.testing import CliRunner
import mergekit_metagpt.merging.whole  # pay for the imports before the children are forked
from mergekit_metagpt.cli import main

config, out = sys.argv[1], Path(sys.argv[2])
words = ["merge", config, str(out), "--quiet", "--no-copy-tokenizer"]
whole = {"model.safetensors", "config.json", "mergekit_config.yml", "metagpt.json", "README.md"}
for moment in range(30):
    child = os.fork()
    if not child:
        os._exit(CliRunner().invoke(main, words).exit_code)
    time.sleep(0.012 * moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(out.exists())
    if out.exists():
        assert {path.name for path in out.iterdir()} == whole
        assert (out / "metagpt.json").read_text().endswith("}\\n")
        out.rename(out.with_name(f"kept-{moment}"))
"""


@on_posix
def test_killed_at_any_moment_the_output_is_whole_or_not_there(config, family, tmp_path):
    out = tmp_path / "merged"
    done = run(sys.executable, "-c", KILLED, config, out)
    assert done.returncode == 0, done.stderr
    assert "False" in done.stdout.split()
    merge(config, out)
    assert not list(tmp_path.glob("*.metagpt-*"))
    expected = read(out)
    for kept in tmp_path.glob("kept-*"):
        tensors = read(kept)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
