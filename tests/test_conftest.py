"""The tests test this tree."""

from pathlib import Path

import pytest
from conftest import differing_files

import mergekit_metagpt

TREE = Path(__file__).parents[1] / "mergekit_metagpt"


def test_the_package_that_is_tested_is_the_tree():
    assert differing_files(TREE, Path(mergekit_metagpt.__path__[0])) == []


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda package: (package / "README.md").write_text("not installed"), []),
        (lambda package: (package / "names.py").write_text("# older"), ["names.py"]),
        (lambda package: (package / "cli" / "gone.py").touch(), ["cli/gone.py"]),
        (lambda package: (package / "py.typed").unlink(), ["py.typed"]),
    ],
)
def test_any_other_copy_is_noticed(change, differing, tmp_path):
    for path in TREE.rglob("*.*"):
        if path.suffix in (".py", ".typed"):
            copy = tmp_path / path.relative_to(TREE)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert differing_files(TREE, tmp_path) == []
    change(tmp_path)
    assert differing_files(TREE, tmp_path) == differing
