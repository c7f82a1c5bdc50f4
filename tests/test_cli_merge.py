"""``mergekit-metagpt merge``: what it prints and refuses, in a process of its own too."""

import json

import pytest
from conftest import (
    command,
    files,
    invoke,
    invoke_merge,
    llama_config,
    merge_config,
    run,
    save_family,
    write_yaml,
)


def test_it_prints_coefficients_warnings_and_the_path(tmp_path):
    paths = save_family(tmp_path, llama_config(), scales=(0.01, 0.1, 0.0))
    raw = merge_config(paths, parameters={"granularity": "model"})
    yml, out = write_yaml(tmp_path / "metagpt.yml", raw), tmp_path / "out"
    done = invoke("merge", yml, out, "--no-copy-tokenizer")
    for expert in json.loads((out / "metagpt.json").read_text())["experts"]:
        assert f" {expert['coefficient']:.4f} " in done.stdout
    end = f"The merge is in {out}. To publish it:\nhf upload USER/NAME {out}\n"
    assert done.stdout.endswith(end)
    dominant, equal = done.stderr.splitlines()[-2:]
    assert f"Warning: {paths['b']} has 99.0% of the merge" in dominant
    assert "set exponent: 1, which gives 0.09" in dominant
    assert f"{paths['c']} is equal to the base" in equal
    quiet = invoke_merge(yml, tmp_path / "quiet")
    assert quiet.stdout == ""
    known = invoke("coefficients", yml, "--json")
    assert quiet.stderr.splitlines()[-2:] == known.stderr.splitlines() == [dominant, equal]
    assert json.loads(known.stdout)["experts"][1]["coefficient"] == pytest.approx(0.99, abs=5e-4)


def test_another_process_writes_the_same_bytes_and_pipes_no_progress(family, tmp_path):
    config = merge_config(family, "metagpt_dare_ties", parameters={"density": 0.5})
    yml = write_yaml(tmp_path / "metagpt.yml", config)
    outs = [tmp_path / "here" / "m", tmp_path / "there" / "m"]
    invoke("merge", yml, outs[0])
    done = run(command("mergekit-metagpt"), "merge", yml, outs[1], PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert files(outs[0]) == files(outs[1])
    (line,) = (it for it in done.stderr.splitlines() if "Failed to copy tokenizer" in it)
    assert line.endswith("; copy its files into the merge.")
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stderr


def test_what_check_finds_stops_it_before_any_work(family, tmp_path):
    raw = merge_config(family, parameters={"granularty": "model"})
    config = write_yaml(tmp_path / "metagpt.yml", raw)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "something").touch()
    before = set(tmp_path.iterdir())
    done = invoke_merge(config, tmp_path / "merged", status=1)
    assert "granularty" in done.stderr
    assert "not empty" in done.stderr
    assert set(tmp_path.iterdir()) == before
