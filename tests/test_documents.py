"""The documents: links work, examples in docstrings are right, and the notebook runs."""

import doctest
import importlib
import pkgutil
import re
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import mergekit_metagpt
from mergekit_metagpt.demo.models import Scale, train_family

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "mergekit_metagpt", "example_configs", "benchmarks", "benchmarks/results")
    for path in (ROOT / folder).glob("*.md")
)
(REPOSITORY,) = re.findall(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mergekit_metagpt.__path__, "mergekit_metagpt.")
    if not module.name.endswith("__main__")
]

LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(document: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["mergekit_metagpt", *MODULES])
def test_docstring_examples_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_within_the_repository_leads_somewhere(document):
    own = re.compile(re.escape(REPOSITORY) + r"/(?:blob|tree)/main/")
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
    for link in LINK.findall((ROOT / document).read_text("utf-8")):
        assert document != "README.md" or link.startswith("https://"), link  # PyPI follows no other
        path, _, anchor = own.sub("/", link.replace(f"{raw}/main/", "/")).partition("#")
        if "://" in path:
            continue
        start = ROOT if path.startswith("/") else (ROOT / document).parent
        target = start / path.lstrip("/") if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        assert not anchor or anchor in headings(target), f"{document}: {link}"


# The notebook

NOTEBOOK = ROOT / "example_configs" / "notebook.ipynb"
SMALL = Scale(hidden_size=16, layers=2, batch=6, base_steps=3, expert_steps=3)


def kinds(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what each output is: a stream's name, or the types of its data.

    A stream may come in several pieces, so what repeats counts once.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    every = [output.get("name") or " ".join(sorted(output.data)) for output in outputs]
    return [kind for kind, _ in groupby(every)]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress")  # tqdm's, without ipywidgets
    train_family(tmp_path / "metagpt-demo", SMALL)
    saved = nbformat.read(NOTEBOOK, 4)
    run = nbformat.read(NOTEBOOK, 4)
    there = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, kernel_name="python3", timeout=300, resources=there).execute()
    assert kinds(run) == kinds(saved)
    assert str(Path.home()) not in NOTEBOOK.read_text("utf-8")
    assert NOTEBOOK.stat().st_size < 60_000
    assert (tmp_path / "metagpt-demo" / "from-notebook" / "metagpt.json").is_file()
