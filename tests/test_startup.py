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
FINDERS = "import sys; print([type(f).__name__ for f in sys.meta_path].count('_Finder'))"

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
        # A path in a .pth file is only put on sys.path: no .pth file in it is read.
        (self.site / "zz-borrowed.pth").write_text(sysconfig.get_path("purelib"))

    def pip(self, *words: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.interpreter]
        # What is borrowed may hold this package too: that does not count as installed.
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        done = run(*pip, *words, *(offline if words[0] == "install" else ["--yes"]))
        assert done.returncode == 0, done.stderr

    def python(self, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.interpreter, "-c", program, **environment)


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


def test_mergekit_knows_metagpt_once_in_every_interpreter_unless_it_is_turned_off(
    installed, tmp_path
):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    assert run(installed.interpreter, script).stdout.strip() == "['metagpt']"
    assert installed.python(FINDERS).stdout == "1\n"
    assert installed.python(FINDERS, MERGEKIT_METAGPT_AUTOLOAD="0").stdout == "0\n"
    copy = installed.site / "another-copy.pth"
    copy.write_text((installed.site / "mergekit-metagpt.pth").read_text())
    assert installed.python(FINDERS).stdout == "1\n"  # although it is read twice
    copy.unlink()


@pytest.mark.parametrize("kind", ["sdist", "editable"])
def test_any_installation_reads_the_startup_file_until_it_is_uninstalled(
    kind, distributions, tmp_path
):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", *([distributions[kind]] if kind in distributions else ["-e", ROOT]))
    assert "mergekit_metagpt.startup" in environment.python(MODULES).stdout.split()
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


def test_where_startup_files_are_not_read_an_import_or_register_does_the_same():
    """Also after MergeKit was imported, as in a notebook that runs during the installation."""
    program = f"""
import sys
sys.path[:0] = {[str(ROOT), sysconfig.get_path("purelib")]!r}
from mergekit.merge_methods import get, registered_methods
before = len(registered_methods())
import mergekit_metagpt
print(len(registered_methods()) - before)
mergekit_metagpt.register()
print(len(registered_methods()) - before, get("metagpt").spec.name)
"""
    done = run(sys.executable, "-S", "-c", program)
    assert done.stdout == "8\n8 metagpt\n", done.stderr
