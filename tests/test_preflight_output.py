"""What ``check`` says of the directory that a merge is to be written to."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import lora, merge_config, problems_of, save_adapter, the_only

from mergekit_metagpt.planning.directory import Work

KEY = "0123456789abcdef"


@pytest.fixture
def problems(family, tmp_path):
    def look(out: Path, *further: str, **options: str) -> list[str]:
        config = merge_config(family)
        config["models"] += [{"model": model} for model in further]
        return problems_of(config, tmp_path, out, **options)

    return look


@pytest.fixture
def place(tmp_path):
    """A directory that holds an empty one, ``out``."""
    (tmp_path / "place" / "out").mkdir(parents=True)
    return tmp_path / "place"


def test_an_input_is_not_overwritten(problems, family):
    for out in (Path(family["a"]), Path(family["a"], "merged")):
        said = f"Output {out} is the input model {family['a']}, or is inside it"
        the_only(problems(out), said)
    the_only(problems(Path(family["base"]).parent), "is not empty; choose a directory that does")


def test_what_a_killed_merge_left_is_nothing_and_anything_else_is_something(problems, place):
    assert problems(place / "out") == []
    (place / "out" / f"out.metagpt-{KEY}" / "complete").mkdir(parents=True)
    (place / "out" / "out.metagpt-lock").touch()
    assert problems(place / "out") == []
    (place / "out" / "metagpt.txt").touch()
    the_only(problems(place / "out"), "is not empty; choose a directory")
    the_only(problems(place / "out" / "metagpt.txt"), "is a file")


def test_a_link_to_nothing_is_named_and_one_to_an_empty_directory_is_good(problems, place):
    link, target = place / "link", place / "target"
    link.symlink_to(target)
    the_only(problems(link), f"Output {link} is a link to {target}, which does not exist; make")
    target.mkdir()
    assert problems(link) == []


def test_a_directory_that_exists_is_what_has_to_be_writable(problems, place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: path != place)
    assert problems(place / "out") == []
    the_only(problems(place / "else"), f"{place} is read-only")


def test_its_disk_is_what_has_to_have_room(problems, place, monkeypatch):
    free = {place: 109_400, place / "out": 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    said = f"The disk of {place} has 109.4 kB left, but 109.4 kB will be written"
    the_only(problems(place / "else"), said)
    free[place] = 1 << 40
    assert problems(place / "else") == []
    the_only(problems(place / "out"), f"The disk of {place}/out has 1 byte left")


def test_what_is_complete_of_the_same_merge_needs_no_room(problems, place, family, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    work = Work(place / "out" / f"out.metagpt-{KEY}")
    work.path.mkdir()
    work.prepare({"config": {"merge_method": "another"}})
    (work.merged / "model.safetensors").write_bytes(bytes(1 << 20))
    work.keep("model.safetensors", {}, [work.merged / "model.safetensors"])
    the_only(problems(place / "out"), "has 1 byte left")
    work.prepare({"config": merge_config(family)})
    assert problems(place / "out") == []


@pytest.mark.parametrize("cache", ["out", "out/cache"])
def test_it_does_not_hold_the_lora_cache(cache, problems, family, place):
    save_adapter(family["base"], place / "lora", lora())
    adapted = f"{family['base']}+{place}/lora"
    found = problems(place / "out", adapted, lora_merge_cache=str(place / cache))
    the_only(found, f"Output {place}/out is the --lora-merge-cache, or holds it")
    assert problems(place / "out", adapted, lora_merge_cache=str(place / "cache")) == []
    assert problems(place / "out", lora_merge_cache=str(place / cache)) == []  # needs none
