"""Faults put into a copy of the package, one at a time: each must make its tests fail.

``python tests/mutants.py`` tries all of them; ``python tests/mutants.py roles`` those of files
whose path contains this word. It exits with 1 if any mutant survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mergekit_metagpt", "tests", "benchmarks", "example_configs", "pyproject.toml")

# By file and the tests that have to notice: what stands there once, and what stands there instead.
MUTANTS = {
    ("core/coefficients.py", "test_coefficients.py"): {
        "** (exponent / 2)": "** exponent",
        "total = math.fsum(shares)": "total = sum(shares)",
    },
    ("core/decision.py", "test_directions.py"): {
        "weights = values**_POWER": "weights = values",
        "farther <= _FARTHER * float(gram.trace())": "True",
        "alike.fill_diagonal_(1)": "alike.fill_diagonal_(0)",
    },
    ("core/directions.py", "test_directions.py"): {
        "gram.diagonal().copy_(by_row.sum(1))": "gram.diagonal().mul_(0)",
    },
    ("core/range_finder.py", "test_directions.py"): {
        "max(_LEAST_ROWS, m // _ONE_ROW_OF)": "1",
        "_ENOUGH_ROWS * squares.shape[1]": "0",
        "sums.addmm_((tau @ drawn.T).T, tau)": "sums.addmm_(drawn @ tau.T, tau * 0)",
    },
    ("core/arrays.py", "test_method_sparsified.py"): {
        "np.partition(array, place)[place]": "array[place]",
    },
    ("core/arrays.py", "test_arrays.py"): {
        "for _ in left:": "for _ in ():",
    },
    ("core/order_statistics.py", "test_method_sparsified.py"): {
        "if None in its:": "if False:",
        "if lowest.start <= place < lowest.stop:": "if lowest.start <= place <= lowest.stop:",
        "lowest.stop + count_of(beyond < value)": "lowest.stop",
        "min(self.stop, places.stop) - max(self.start, places.start)": "self.stop - self.start",
        "            left -= counts[-1]\n": "",
    },
    ("core/draws.py", "test_method_sparsified.py"): {
        "np.arange(last, -1, -1)": "np.arange(last + 1)",
        "counts[wrong] = ": "_ = ",
    },
    ("core/task_vectors.py", "test_task_vectors.py"): {
        "chosen.sort(key=lambda pair: -pair[1])": "chosen.sort(key=lambda pair: pair[1])",
        "_LEAST_MEAN_SQUARE * size <= squared_norm": "squared_norm",
    },
    ("core/roles.py", "test_roles.py"): {
        "if bias and bias[0] == sizes[1] else": "if bias and bias[0] == sizes[0] else",
        "Role.ROWS if any(map(shape_of, heads))": "Role.ROWS if all(map(shape_of, heads))",
    },
    ("method/sparsified.py", "test_method_sparsified.py"): {
        "size - max(1, int(density * size))": "size - int(density * size)",
        "majority = votes.sum(dim=0).ge_(0)": "majority = votes.sum(dim=0).gt_(0)",
        "if 0 < first < equals:": "if False:",
        "names[first == equals]": "names[1]",
    },
    ("measure/identity.py", "test_surveys.py"): {
        ", stat.st_ctime_ns": "",
        "*([name, stat_of": "*([name] or [stat_of",
    },
    ("measure/surveys.py", "test_surveys.py"): {
        " and not (products and not survey.has_products)": "",
        "replace(survey, experts=names)": "replace(survey, experts=names[::-1])",
    },
    ("measure/provider.py", "test_measure_survey.py"): {
        "                self._require_own_layer(tensor)\n": "                pass\n",
        "if stored is None or not (": "if stored is None and not (",
    },
    ("measure/provider.py", "test_method_directions.py"): {
        "key=lambda number: not is_table(": "key=lambda number: is_table(",
    },
    ("measure/survey.py", "test_surveys.py"): {
        "        if self.left_out:\n            return None": "",
        "for it in moved.values()}) < len(moved)": "for it in moved.values()}) < 0",
        "return None if any(frozen) else some": "return some",
    },
    ("planning/job.py", "test_api.py"): {
        "            vars(loading).update(settings)": "            pass",
        "            torch.set_num_threads(threads)": "            pass",
    },
    ("planning/job.py", "test_adapters.py"): {
        "digest(options.lora_merge_dtype, identity)": "digest(identity)",
    },
    ("planning/directory.py", "test_merging_directory.py"): {
        "            _sync(file)\n": "",
        "        _sync(self.merged)\n": "",
        "    _sync(part)\n": "",
        "(self.merged / name).stat().st_size == size": "(self.merged / name).stat()",
        "            with suppress(OSError):  # one of the two places is on another disk\n": (
            "            if False:\n"
        ),
        "if self._lock(self.path.parent).exists():": "if False:",
    },
    ("planning/directory.py", "test_merging_whole.py"): {
        'return 2 if name == "config.json" else': "return",
        "            self.take_back(directory)\n            raise": "            raise",
        "complete = len(work.records) if is_valid() else 0": "complete = len(work.records)",
    },
    ("merging/whole.py", "test_merging_whole.py"): {
        '"tokenizer": tokenizer,': "",
    },
    ("merging/whole.py", "test_merging_directory.py"): {
        '"inputs": inputs,': "",
        '        facts["seed"] = job.options.random_seed\n': "",
    },
    ("cli/__init__.py", "test_merging_directory.py"): {
        "            signal.signal(each, signal.SIG_IGN)": "            pass",
    },
    ("report/stock_config.py", "test_report_stock_config.py"): {
        "key=lambda entry: order.index(entry.model)": "key=lambda entry: -order.index(entry.model)",
        "if len(templates) > 1:": "if templates:",
    },
    ("startup.py", "test_startup_imports.py"): {
        'if not self._leads and "mergekit" in sys.modules:': "if False:",
    },
}


def survives(copy: Path, file: str, old: str, new: str, tests: str) -> bool:
    """Return whether the tests pass although a file of the copy is wrong."""
    path = copy / "mergekit_metagpt" / file
    right = path.read_text(encoding="utf-8")
    if right.count(old) != 1:
        raise SystemExit(f"{file} has {old!r} {right.count(old)} times, not once; mend its mutant.")
    path.write_text(right.replace(old, new), encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", f"tests/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(right, encoding="utf-8")
    if done.returncode not in (0, 1):  # the tests have not run
        raise SystemExit(f"{tests} cannot run:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main(word: str = "") -> int:
    """Try the mutants; return how many survive, at most 1."""
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(place, name))
        for (file, tests), faults in MUTANTS.items():
            for old, new in faults.items() if word in file else ():
                alive = survives(Path(place), file, old, new, tests)
                survivors += alive
                print("SURVIVES" if alive else "killed", file, repr(new), tests, flush=True)
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
