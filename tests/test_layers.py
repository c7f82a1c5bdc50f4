"""The packages and their layers: imports go down, and there is no import cycle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergekit_metagpt"

# From the top. A module may import from its own package and from the layers below.
LAYERS = [
    {"cli"},
    {"api"},
    {"merging", "preflight", "report", "demo", "evaluation"},
    {"planning", "diagnosis"},
    {"method", "measure"},
    {"core"},
    {"top"},  # the files at the package's top, which import nothing but each other
]
# Entry points of Python and MergeKit. They may import every package, and none imports them.
ENTRY_POINTS = {"__init__", "__main__", "startup"}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ENTRY_POINTS or path.parent != PACKAGE
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
    # A name is a module, a package, or something in one of them.
    places = {it for name in own for it in (name, name.rpartition(".")[0])}
    return {it for place in places for it in (place, f"{place}.__init__") if it in FILES}


def package(module: str) -> str:
    return module.partition(".")[0] if "." in module else "top"


def layer(module: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package(module) in packages)


def test_imports_go_down_and_in_no_circle():
    graph = {module: imports(path) - {module} for module, path in FILES.items()}
    for module, imported in graph.items():
        for other in imported:
            goes_down = package(other) == package(module) or layer(other) > layer(module)
            assert goes_down, f"{module} imports {other}, which is not in a layer below"
    assert list(TopologicalSorter(graph).static_order())
    arrows = {(package(m), package(o)) for m, imported in graph.items() for o in imported}
    assert len(LAYERS) <= 7
    assert len({(start, end) for start, end in arrows if start != end}) <= 45
    assert set(map(package, FILES)) == set().union(*LAYERS)


def test_the_maps_name_every_folder_and_every_file_at_the_top():
    for document in ("CONTRIBUTING.md", "mergekit_metagpt/README.md"):
        text = (ROOT / document).read_text("utf-8")
        assert all(f"{folder}/" in text for folder in set().union(*LAYERS) - {"top"})
    assert all("." in module or f"{module}.py" in text for module in FILES)  # in the package's


def test_private_names_are_used_in_one_module_only():
    """Names with an underscore, or on the list in ``mergekit_private``, belong to their library."""
    from mergekit_metagpt.mergekit_private import PRIVATE

    listed = {re.split(r"[:.]", place)[-1] for place in PRIVATE.values()}
    promised = {"_execute"}  # overridden; only the class itself calls it
    for module, path in FILES.items():
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
