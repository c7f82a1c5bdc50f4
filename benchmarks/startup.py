"""The time that the start-up file adds to every interpreter: `python -m benchmarks.startup`.

Two virtual environments, one with this package and one without, run ``python -c pass`` in turn.
Writes benchmarks/results/startup.md.
"""

import compileall
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

from benchmarks.results_file import write_measured

ROOT = Path(__file__).parents[1]
ROUNDS = 20
WARM_UP = 3


def environment(directory: Path, installed: bool) -> Path:
    """Make a virtual environment and return its interpreter."""
    venv.create(directory, with_pip=False)
    (site,) = directory.glob("lib/python*/site-packages")
    if installed:
        ignored = shutil.ignore_patterns("__pycache__", "*.pth", "*.start")
        shutil.copytree(ROOT / "mergekit_metagpt", site / "mergekit_metagpt", ignore=ignored)
        compileall.compile_dir(site / "mergekit_metagpt", quiet=1)  # as pip does
        for file in (ROOT / "mergekit_metagpt").glob("mergekit-metagpt.*"):
            shutil.copy(file, site)
    return directory / "bin" / "python"


def milliseconds(interpreter: Path) -> float:
    """Time one start of an interpreter that does nothing."""
    start = time.perf_counter()
    subprocess.run([interpreter, "-c", "pass"], check=True)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Measure, print and record."""
    with tempfile.TemporaryDirectory() as directory:
        interpreters = {
            name: environment(Path(directory, name), name == "with") for name in ("without", "with")
        }
        times: dict[str, list[float]] = {name: [] for name in interpreters}
        for turn in range(WARM_UP + ROUNDS):
            for name, interpreter in interpreters.items():
                elapsed = milliseconds(interpreter)
                if turn >= WARM_UP:
                    times[name].append(elapsed)
    without, with_ = (statistics.median(times[name]) for name in ("without", "with"))
    report = f"""# Start of an interpreter

`python -c pass`, {ROUNDS} interleaved runs each; Python {platform.python_version()},
{platform.machine()}. Written by `python -m benchmarks.startup`.

| | median, ms | least, ms | most, ms |
|---|---|---|---|
| without the package | {without:.2f} | {min(times["without"]):.2f} | {max(times["without"]):.2f} |
| with the package | {with_:.2f} | {min(times["with"]):.2f} | {max(times["with"]):.2f} |

The start-up file adds {with_ - without:.2f} ms (ratio {with_ / without:.3f}).
"""
    write_measured("startup.md", report)
    print(report)


if __name__ == "__main__":
    main()
