"""What is published, installed for real, and how stock MergeKit then finds it: start-up files."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import hatchling.build
import pytest
from conftest import run
from twine.commands.check import check

ROOT = Path(__file__).parents[1]

MODULES = "import sys; print(*sys.modules)"

LIST = """
from mergekit.merge_methods import registered_methods
print([m.spec.name for m in registered_methods() if "metagpt" in m.spec.name])
"""

SPAWN = """
import multiprocessing
def names(_):
    from mergekit.merge_methods import get
    return get("metagpt").spec.name
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(names, [0]))
"""

# Reads the start-up file in an interpreter that `site` has left alone (-S). Python 3.13 decodes
# such files with utf_8_sig.
WATCH = """
import encodings.utf_8_sig, os, site, sys
from unittest.mock import Mock
sys.path.append(sys.argv[1])
os.environ, events = Mock(wraps=os.environ), []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)))
site.addpackage(sys.argv[1], "mergekit-metagpt.pth", set())
seen = events.copy()
print({event for event, _ in seen})
opened = [arguments for event, arguments in seen if event == "open"]
print([(os.path.basename(path).split(".")[0], mode) for path, mode, _ in opened])
print(os.environ.mock_calls)
"""


class Environment:
    """A virtual environment that borrows MergeKit, and nothing that starts up, from ours."""

    def __init__(self, directory: Path):
        venv.create(directory, with_pip=False)
        scheme = "nt" if os.name == "nt" else "posix_prefix"
        paths = sysconfig.get_paths(scheme, {"base": directory, "platbase": directory})
        self.interpreter = Path(paths["scripts"], Path(sys.executable).name)
        self.site = Path(paths["purelib"])
        self.borrow(sysconfig.get_path("purelib"))

    def borrow(self, *paths: str | Path) -> None:
        # A path in a .pth file is only put on sys.path: no .pth file in it is read.
        (self.site / "zz-borrowed.pth").write_text("\n".join(map(str, paths)))

    def pip(self, *words: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.interpreter]
        # What is borrowed may hold this package too: that does not count as installed.
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        done = run(*pip, *words, *(offline if words[0] == "install" else ["--yes"]))
        assert done.returncode == 0, done.stderr

    def python(self, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.interpreter, "-c", program, **environment)

    def methods(self, **environment: str) -> list[str]:
        done = self.python(LIST, **environment)
        assert done.returncode == 0, done.stderr
        return eval(done.stdout)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # which PEP 517 asks for
        return {
            "wheel": directory / hatchling.build.build_wheel(str(directory)),
            "sdist": directory / hatchling.build.build_sdist(str(directory)),
        }


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """An environment with the wheel. Tests share it and leave it as it was."""
    environment = Environment(tmp_path_factory.mktemp("venv"))
    environment.modules_before = environment.python(MODULES).stdout.split()
    environment.pip("install", distributions["wheel"])
    return environment


@pytest.fixture
def borrowing(installed):
    """Let the environment borrow other folders until the test ends."""
    yield installed.borrow
    installed.borrow(sysconfig.get_path("purelib"))


def fake_mergekit(directory: Path, version: str, init: str, **modules: str) -> Path:
    """A MergeKit with another registry than the one that this package knows."""
    package = directory / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (directory / "mergekit" / "__init__.py").touch()
    for name, source in {"__init__": init, **modules}.items():
        (package / f"{name}.py").write_text(source)
    information = directory / f"mergekit-{version}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n"
    (information / "METADATA").write_text(metadata)
    return directory


def test_the_wheel_holds_the_package_and_the_startup_files_only(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        inside = {n for n in archive.namelist() if n.startswith("mergekit_metagpt/")}
        outside = {n for n in archive.namelist() if not n.startswith("mergekit_metagpt")}
    assert outside == {"mergekit-metagpt.pth", "mergekit-metagpt.start"}
    assert "mergekit_metagpt/py.typed" in inside
    assert not {n for n in inside if n.endswith((".pth", ".start"))}


def test_twine_finds_nothing_to_object_to(distributions, capsys):
    assert not check([str(path) for path in distributions.values()], strict=True)
    assert capsys.readouterr().out.count("PASSED") == 2


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_mergekit_knows_metagpt_from_installation_to_uninstallation(kind, distributions, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", *([distributions[kind]] if kind in distributions else ["-e", ROOT]))
    assert "metagpt" in environment.methods()
    if kind == "wheel":
        assert environment.methods(MERGEKIT_METAGPT_AUTOLOAD="0") == []
        script = tmp_path / "spawn.py"
        script.write_text(SPAWN)
        assert run(environment.interpreter, script).stdout.strip() == "['metagpt']"
    environment.pip("uninstall", "mergekit-metagpt")
    assert not list(environment.site.glob("*mergekit*"))


def test_an_interpreter_that_starts_up_imports_two_modules_more(installed):
    more = set(installed.python(MODULES).stdout.split()) - set(installed.modules_before)
    assert more == {"mergekit_metagpt", "mergekit_metagpt.startup"}


def test_starting_up_opens_three_files_and_reads_one_environment_variable(installed):
    done = run(installed.interpreter, "-I", "-S", "-c", WATCH, installed.site)
    assert done.returncode == 0, done.stderr
    events, opened, variables = done.stdout.splitlines()
    assert eval(events) <= {"open", "compile", "exec", "import", "os.listdir", "marshal.loads"}
    assert set(eval(opened)) == {("mergekit-metagpt", "r"), ("__init__", "r"), ("startup", "r")}
    assert variables == "[call.get('MERGEKIT_METAGPT_AUTOLOAD')]"


def test_reading_the_startup_file_twice_registers_once(installed):
    startup, copy = (
        installed.site / f"{name}.pth" for name in ("mergekit-metagpt", "another-copy")
    )
    copy.write_text(startup.read_text())
    finders = "import sys; print([type(f).__name__ for f in sys.meta_path].count('_Finder'))"
    assert installed.python(finders).stdout.strip() == "1"
    copy.unlink()


def test_without_mergekit_nothing_happens(installed, borrowing):
    borrowing()
    done = installed.python("import json; print('fine')")
    assert (done.stdout, done.stderr) == ("fine\n", "")
    done = installed.python("import mergekit.merge_methods")
    assert "No module named 'mergekit'" in done.stderr
    assert "metagpt" not in done.stderr


@pytest.mark.parametrize(
    ("version", "modules"),
    [
        ("0.1.4", {"init": "from . import registry", "registry": "REGISTERED = {}"}),
        ("0.9.0", {"init": ""}),
    ],
)
def test_an_incompatible_mergekit_gives_one_warning_that_says_what_to_install(
    version, modules, installed, borrowing, tmp_path
):
    borrowing(fake_mergekit(tmp_path, version, **modules))
    done = installed.python("import mergekit.merge_methods; print('fine')")
    assert done.stdout == "fine\n"
    assert done.stderr.count("mergekit-metagpt needs") == 1
    assert f"found {version}" in done.stderr
    assert "pip install 'mergekit>=0.1.5,<0.1.6'" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_startup_files_are_not_read_register_does_the_same():
    program = f"""
import sys
sys.path[:0] = {[str(ROOT), sysconfig.get_path("purelib")]!r}
from mergekit.merge_methods import get, registered_methods
before = len(registered_methods())
import mergekit_metagpt
mergekit_metagpt.register()
print(len(registered_methods()) - before, get("metagpt").spec.name)
"""
    done = run(sys.executable, "-S", "-c", program)
    assert done.stdout == "8 metagpt\n", done.stderr


def test_genomes_may_be_imported_first_and_modules_keep_their_own_loaders():
    """MergeKit's evolution imports genomes before merge methods, in its workers too."""
    program = """
import inspect, sys
import mergekit.evo.genome
from mergekit.merge_methods import get
print(get("metagpt").spec.name, get("metagpt_ties").spec.name)
for name in ("mergekit.merge_methods", "mergekit.merge_methods.registry"):
    module = sys.modules[name]
    print(type(module.__spec__.loader).__name__, type(module.__loader__).__name__)
    inspect.getsource(module)
"""
    done = run(sys.executable, "-W", "error::RuntimeWarning", "-c", program)
    assert done.stdout.split() == ["metagpt", "metagpt_ties", *["SourceFileLoader"] * 4], (
        done.stderr
    )
    assert "mergekit-metagpt needs" not in done.stderr
