"""The notebook of example_configs runs, and shows what it showed when it was run."""

from itertools import groupby
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from mergekit_metagpt.demo.models import Scale, train_family

NOTEBOOK = Path(__file__).parents[1] / "example_configs" / "notebook.ipynb"
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
