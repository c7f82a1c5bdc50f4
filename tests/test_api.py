"""The Python interface: what the commands do, as functions."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import command, invoke, merge_config, run, write_yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import mergekit_metagpt
from mergekit_metagpt.planning.config import plain
from mergekit_metagpt.wording import BadInputError

QUIET = MergeOptions(copy_tokenizer=False, quiet=True)


def test_a_survey_gives_theorem_10(family):
    base: Any = {"model": {"path": family["base"]}}  # as in a config
    experts = [ModelReference.model_validate(family[name]) for name in ("b", "a")]
    found = mergekit_metagpt.survey(base, experts, options=QUIET)
    assert str(found.base) == family["base"]
    assert found.experts == [family["b"], family["a"]]
    shares = mergekit_metagpt.scaling_coefficients(found.squared_norms)
    assert [expert.mean for expert in found.summary.experts] == shares[::-1]  # canonical order
    assert found.cosines[0][0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("form", "granularity"),
    [(str, "model"), (MergeConfiguration.model_validate, "direction"), (dict, None)],
)
def test_a_plan_has_the_figures_of_the_command(form, granularity, family, config):
    raw = merge_config(family)
    given = form(config if form is str else raw)
    found = mergekit_metagpt.plan(given, granularity=granularity, options=QUIET)
    words = ["--granularity", granularity] if granularity else []
    with ThreadPoolExecutor(1) as pool:  # commands run in other threads, too
        done = pool.submit(invoke, "coefficients", config, "--json", *words).result()
    shown = json.loads(done.stdout)
    assert found.as_json() == shown
    assert found.coefficients == {e["model"]: e["coefficient"] for e in shown["experts"]}
    assert raw == merge_config(family)


def test_a_merge_is_that_of_the_command(family, tmp_path):
    raw = merge_config(family, "metagpt_dare_linear", parameters={"density": 0.5})
    merged = mergekit_metagpt.merge(raw, tmp_path / "function", options=QUIET)
    yml = write_yaml(tmp_path / "metagpt.yml", raw)
    seed = merged.record["seed"]
    invoke("merge", yml, tmp_path / "command", "--random-seed", seed, "--no-copy-tokenizer")
    first, second = (tmp_path / name / "model.safetensors" for name in ("function", "command"))
    assert first.read_bytes() == second.read_bytes()
    assert merged.path == tmp_path / "function"
    assert merged.record == json.loads((tmp_path / "function" / "metagpt.json").read_text())
    assert yaml.safe_load(merged.record["config"]) == raw
    assert merged.warnings == []


@pytest.mark.parametrize(
    ("method", "options"), [("metagpt", {"async_write": True}), ("task_arithmetic", {})]
)
def test_a_stock_merge_in_another_thread_is_in_no_record(method, options, family, tmp_path):
    """MergeKit's own `run_merge` merges in threads of its own, whose tensors are noted."""
    other = merge_config({"base": family["b"], "a": family["base"]})
    config = merge_config({"base": family["base"], "a": family["a"]}, method)
    config["parameters"] = {"weight": 1.0}

    def after_another(*words, **settings):
        beside = (MergeConfiguration.model_validate(other), str(tmp_path / "beside"), QUIET)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run_merge, *beside).result()
        run_merge(*words, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_metagpt.merging.whole.run_merge", after_another)
        merged = mergekit_metagpt.merge(
            config, tmp_path / "out", options=QUIET.model_copy(update=options)
        )
    known = [expert["model"] for expert in merged.record["experts"]]
    assert known == [family["a"]] * (method == "metagpt")


def test_the_caller_keeps_its_loader_options_and_threads(family):
    before, options = torch.get_num_threads(), QUIET.model_copy(update={"num_threads": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoaderCache(), "lora_cache_dir", "of the caller", raising=False)
        mergekit_metagpt.plan(merge_config(family), options=options)
        assert LoaderCache().lora_cache_dir == "of the caller"
    assert torch.get_num_threads() == before != 2


def test_bad_input_is_one_error_with_a_sentence(family, tmp_path):
    raw, missing = merge_config(family, parameters={"granularity": "tensr"}), tmp_path / "none.yml"
    for call, sentence in (
        (lambda: mergekit_metagpt.merge(raw, tmp_path / "out"), "granularity"),
        (lambda: mergekit_metagpt.plan(raw), "granularity"),
        (lambda: mergekit_metagpt.plan(missing), "cannot be read"),
        (lambda: mergekit_metagpt.plan(None), "not None"),
        (lambda: mergekit_metagpt.survey(family["base"], [missing]), str(missing)),
    ):
        with pytest.raises(BadInputError, match=sentence):
            call()
    assert not (tmp_path / "out").exists()


def test_notebooks_show_tables_with_escaped_names_and_plots(family, tmp_path):
    base, *experts = family.values()
    found = mergekit_metagpt.survey(base, experts, options=QUIET)
    planned = mergekit_metagpt.plan(merge_config(family), options=QUIET)
    merged = mergekit_metagpt.merge(merge_config(family), tmp_path / "<b>&", options=QUIET)
    for shown in (found, planned, merged):
        page = shown._repr_html_()
        assert page.startswith("<pre")
        assert " a " in page
        assert ": a 0." in repr(shown)
        assert "ModelReference" not in repr(shown)
    assert "Cosines" in found._repr_html_()
    assert "Merged into" in merged._repr_html_()
    assert "&lt;b&gt;&amp;" in merged._repr_html_()
    assert len(found.plot().axes) == 2
    assert len(planned.plot().axes) == 3
    assert planned.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_the_module_is_the_command():
    shown = run(sys.executable, "-m", "mergekit_metagpt", "--help").stdout
    assert shown.startswith("Usage: python -m mergekit_metagpt [OPTIONS] COMMAND")
    installed = run(command("mergekit-metagpt"), "--help").stdout
    assert shown.splitlines()[1:] == installed.splitlines()[1:]


def test_public_names_are_documented():
    for name in mergekit_metagpt.__all__:
        assert getattr(mergekit_metagpt, name).__doc__
    text = (Path(__file__).parents[1] / "mergekit_metagpt" / "README.md").read_text("utf-8")
    assert all(f"`{name}" in text for name in mergekit_metagpt.__all__)


def test_values_that_yaml_does_not_hold_are_written_as_what_they_stand_for(tmp_path):
    class Word(str, Enum):
        DIRECTION = "direction"

    path = tmp_path / "a+b@c"
    found = plain({"granularity": Word.DIRECTION, "weight": np.float32(0.5), "path": path})
    assert found == {"granularity": "direction", "weight": 0.5, "path": str(path)}
    assert {type(value) for value in found.values()} == {str, float}
