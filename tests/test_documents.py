"""The documents: their links work, and the examples in docstrings give the stated results."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mergekit_metagpt

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
        path, _, anchor = own.sub("/", link.replace(f"{raw}/main/", "/")).partition("#")
        if "://" in path:
            continue
        start = ROOT if path.startswith("/") else (ROOT / document).parent
        target = start / path.lstrip("/") if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        assert not anchor or anchor in headings(target), f"{document}: {link}"


def test_the_readme_links_by_absolute_addresses_which_pypi_can_follow():
    for link in LINK.findall((ROOT / "README.md").read_text("utf-8")):
        assert link.startswith("https://"), link
