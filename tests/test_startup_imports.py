"""In whatever order and through whatever hooks MergeKit is imported, the methods are there."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import on_posix

pytestmark = on_posix  # programs run in forks

# Imports what takes long, but neither MergeKit nor a module of this package, and then runs each
# program in a process of its own.
SERVER = """
import contextlib, io, json, os, sys, traceback
import click, peft, pydantic, rich.table, safetensors.torch, torch, tqdm, transformers, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
assert "mergekit" not in sys.modules
for line in sys.stdin:
    reader, writer = os.pipe()
    if not os.fork():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            try:
                exec(json.loads(line), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
        os.write(writer, out.getvalue()[-60_000:].encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as child:
        print(json.dumps(child.read()), flush=True)
    os.wait()
"""

COUNT = """
import sys
from mergekit.merge_methods import registered_methods
registry = sys.modules["mergekit.merge_methods.registry"]
assert registered_methods() == registry.registered_methods()
print(sum("metagpt" in method.spec.name for method in registered_methods()))
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """Run a program where MergeKit is not imported yet; return what it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(program: str) -> str:
            server.stdin.write(json.dumps(program) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


def test_any_module_may_be_imported_first(fresh):
    """Of those that import MergeKit and are needed while it is half imported."""
    needed = fresh("import sys, mergekit.merge_methods; print(*sys.modules)").split()
    parts = ("mergekit_metagpt.method", "mergekit_metagpt.measure")
    ours = [name for name in needed if name.startswith(parts)]
    assert {f"{parts[0]}.merge_method", f"{parts[1]}.provider"} <= {*ours}
    for name in ours:
        assert fresh(f"import {name}\n{COUNT}") == "8\n", name


ASKS_THE_OTHERS = """
import sys
class Asking:
    def find_spec(self, *arguments):
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(*arguments)):
                return spec
sys.meta_path.insert(0, Asking())
"""

# As typeguard and jaxtyping do.
ASKS_THE_PATHS = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader
class Checked(SourceFileLoader):
    pass
class TypeChecker:
    def find_spec(self, name, *arguments):
        if name.split(".")[0] == "mergekit":
            spec = PathFinder.find_spec(name, *arguments)
            if isinstance(spec.loader, SourceFileLoader):
                spec.loader = Checked(spec.loader.name, spec.loader.path)
            return spec
sys.meta_path.insert(0, TypeChecker())
import mergekit.merge_methods.registry as registry
assert type(registry.__loader__).__name__ == type(registry.__spec__.loader).__name__ == "Checked"
"""

RELOADS = """
import importlib, sys
import mergekit.merge_methods.registry
importlib.reload(sys.modules["mergekit.merge_methods.generalized_task_arithmetic"])
importlib.reload(sys.modules["mergekit.merge_methods.registry"])
"""

FORGETS = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "mergekit"]:
    del sys.modules[name]
"""

IMPORTS_ANEW = "import mergekit.merge_methods, mergekit_metagpt.planning.forecast" + FORGETS

COPIES_THE_LOADER = (
    """
import copy, importlib.util
import mergekit
spec = copy.deepcopy(importlib.util.find_spec("mergekit.merge_methods"))
assert spec.loader.get_source(spec.name).startswith("# Copyright")
"""
    + FORGETS
)

# MergeKit's evolution does so, in its workers too. Modules keep their own loaders.
IMPORTS_GENOMES_FIRST = """
import inspect, sys
import mergekit.evo.genome
for name in ("mergekit.merge_methods", "mergekit.merge_methods.registry"):
    module = sys.modules[name]
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    inspect.getsource(module)
"""

BEFORE = [
    ASKS_THE_OTHERS, ASKS_THE_PATHS, RELOADS, IMPORTS_ANEW, COPIES_THE_LOADER, IMPORTS_GENOMES_FIRST
]  # fmt: skip


@pytest.mark.parametrize("before", BEFORE)
def test_other_hooks_and_reloads_leave_the_methods_there(before, fresh):
    assert fresh(before + COUNT) == "8\n"


@pytest.mark.parametrize(
    ("version", "modules"),
    [
        ("0.1.4", {"__init__": "from . import registry", "registry": "REGISTERED = {}"}),
        ("0.9.0", {"__init__": ""}),
        (None, {"__init__": ""}),  # without metadata
    ],
)
def test_an_incompatible_mergekit_gives_one_warning_that_says_what_to_install(
    version, modules, fresh, tmp_path
):
    package = tmp_path / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    for name, source in modules.items():
        (package / f"{name}.py").write_text(source)
    said = fresh(f"""
import importlib.metadata, sys
sys.path.insert(0, {str(tmp_path)!r})
def version(name):
    if {version!r} is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return {version!r}
importlib.metadata.version = version
import mergekit.merge_methods
print("fine")
""")
    found = version or "an unknown version"
    assert said.count(f"mergekit-metagpt needs mergekit>=0.1.5,<0.1.6 and found {found}") == 1
    assert "pip install 'mergekit>=0.1.5,<0.1.6'" in said
    assert said.endswith("fine\n")
    assert "Traceback" not in said


def test_without_mergekit_nothing_is_said(fresh):
    said = fresh("import sys; sys.modules['mergekit'] = None; import mergekit.merge_methods")
    assert "ModuleNotFoundError" in said
    assert "metagpt" not in said
