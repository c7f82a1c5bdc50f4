"""The rooms of the package: imports go down the floors, and there is no import cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergekit_metagpt"

# From the top. A module may import from its own room and from the floors below.
FLOORS = [
    {"cli"},
    {"api"},
    {"merging", "preflight", "report", "demo", "evaluation"},
    {"planning", "diagnosis"},
    {"method"},
    {"measure"},
    {"core"},
    {"top"},  # the files at the package's top, which import nothing but each other
]
# Entry points of Python and MergeKit. They may import every room, but no room imports them.
DOORS = {"__init__", "__main__", "startup"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).stem not in DOORS or path.parent != PACKAGE
    }


def imports(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.removeprefix("mergekit_metagpt.") for name in found if "mergekit_metagpt" in name}
    known = modules()
    resolved = set()
    for name in own:
        while name and name not in known and f"{name}.__init__" not in known:
            name = name.rpartition(".")[0]
        if name:
            resolved.add(name if name in known else f"{name}.__init__")
    return resolved


def room(module: str) -> str:
    return module.partition(".")[0] if "." in module else "top"


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    for imported in imports(modules()[module]):
        assert room(imported) == room(module) or floor(imported) > floor(module), (
            f"{module} imports {imported}, which is not on a floor below"
        )


def test_there_is_no_circle():
    graph = {module: imports(path) - {module} for module, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())


def test_every_room_has_a_floor():
    assert {room(module) for module in modules()} == set().union(*FLOORS)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "mergekit_metagpt/README.md"])
def test_the_map_names_every_folder(document):
    text = (ROOT / document).read_text("utf-8")
    for folder in set().union(*FLOORS) - {"top"}:
        assert f"{folder}/" in text


def test_the_map_names_every_file_at_the_top():
    text = (PACKAGE / "README.md").read_text("utf-8")
    for module in modules():
        assert "." in module or f"{module}.py" in text


def test_private_names_are_used_in_one_module_only():
    """Names with an underscore, or on the list in ``mergekit_private``, belong to their library."""
    from mergekit_metagpt.mergekit_private import PRIVATE

    listed = {private.path.rpartition(".")[2] for private in PRIVATE.values()}
    promised = {"_execute"}  # overridden; only the class itself calls it
    for module, path in modules().items():
        if module == "mergekit_private":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.module.startswith("mergekit_metagpt"):
                names = {alias.name for alias in node.names}
                assert not {n for n in names if n.startswith("_")} | (names & listed), module
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                owner = ast.unparse(node.value)
                own = owner in ("self", "cls", "super()") or node.attr.startswith("__")
                assert own or node.attr in promised, f"{module}: {ast.unparse(node)}"
