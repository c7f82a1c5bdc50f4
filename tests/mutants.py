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

# The file, what stands there once, what stands there instead, and the tests that have to notice.
MUTANTS = [
    ("core/coefficients.py", "** (exponent / 2)", "** exponent", "test_coefficients.py"),
    (
        "core/coefficients.py",
        "total = math.fsum(shares)",
        "total = sum(shares)",
        "test_coefficients.py",
    ),
    (
        "core/decision.py",
        "found = _participation(values**_POWER)",
        "found = _participation(values)",
        "test_directions.py",
    ),
    ("core/decision.py", "farther <= _FARTHER * float(gram.trace())", "True", "test_directions.py"),
    (
        "core/decision.py",
        "alike.fill_diagonal_(1)",
        "alike.fill_diagonal_(0)",
        "test_directions.py",
    ),
    (
        "core/task_vectors.py",
        "chosen.sort(key=lambda pair: -pair[1])",
        "chosen.sort(key=lambda pair: pair[1])",
        "test_task_vectors.py",
    ),
    (
        "core/task_vectors.py",
        "_LEAST_MEAN_SQUARE * size <= squared_norm < torch.finfo(torch.float32).max",
        "squared_norm < torch.finfo(torch.float32).max",
        "test_task_vectors.py",
    ),
    (
        "core/roles.py",
        "if bias and bias[0] == sizes[1] else",
        "if bias and bias[0] == sizes[0] else",
        "test_roles.py",
    ),
    (
        "method/sparsified.py",
        "size - max(1, int(density * size))",
        "size - int(density * size)",
        "test_method_sparsified.py",
    ),
    (
        "method/sparsified.py",
        "majority = votes.sum(dim=0).ge_(0)",
        "majority = votes.sum(dim=0).gt_(0)",
        "test_method_sparsified.py",
    ),
    (
        "measure/identity.py",
        "return stat.st_ino, stat.st_size, stat.st_mtime_ns",
        "return stat.st_ino, stat.st_size, 0",
        "test_surveys.py",
    ),
    (
        "measure/identity.py",
        "return [os.path.realpath(path), *([name, stat_of",
        "return [os.path.realpath(path), *([name] or [stat_of",
        "test_surveys.py",
    ),
    (
        "measure/surveys.py",
        "if survey is None or (products and survey.grams is None):\n                    #",
        "if survey is None:\n                    #",
        "test_surveys.py",
    ),
    (
        "measure/surveys.py",
        "json.dump(_as_json(replace(survey, experts=self.experts)), part)",
        "json.dump(_as_json(replace(survey, experts=self.experts[::-1])), part)",
        "test_surveys.py",
    ),
    (
        "measure/survey.py",
        "        if self.left_out:\n            return None",
        "",
        "test_surveys.py",
    ),
    (
        "measure/survey.py",
        "return some if len(set(moved)) == len(moved) else None",
        "return some",
        "test_surveys.py",
    ),
    (
        "planning/job.py",
        "            vars(loading).update(settings)",
        "            pass",
        "test_api.py",
    ),
    (
        "planning/job.py",
        "            torch.set_num_threads(threads)",
        "            pass",
        "test_api.py",
    ),
    (
        "planning/job.py",
        "    key = digest(options.lora_merge_dtype, identities)[:16]",
        "    key = digest(identities)[:16]",
        "test_lora_cache.py",
    ),
    ("planning/directory.py", "            sync(file)\n", "", "test_merging_directory.py"),
    ("planning/durable.py", "    sync(part)\n", "", "test_merging_directory.py"),
    ("planning/directory.py", "        sync(self.merged)\n", "", "test_merging_directory.py"),
    (
        "planning/directory.py",
        "file.exists() and file.stat().st_size == size",
        "file.exists()",
        "test_merging_directory.py",
    ),
    (
        "planning/directory.py",
        "complete = len(work.records) if is_valid() else 0",
        "complete = len(work.records)",
        "test_merging_whole.py",
    ),
    (
        "planning/directory.py",
        'return 2 if name == "config.json" else',
        "return",
        "test_merging_whole.py",
    ),
    (
        "planning/directory.py",
        "        except BaseException:\n            self._take_back(work)\n            raise",
        "        except BaseException:\n            raise",
        "test_merging_whole.py",
    ),
    ("merging/whole.py", '"inputs": inputs.identity,', "", "test_merging_directory.py"),
    (
        "merging/whole.py",
        '"tokenizer": way.plan and way.plan.tokenizer,',
        "",
        "test_merging_directory.py",
    ),
    (
        "merging/whole.py",
        '        facts["seed"] = job.options.random_seed\n',
        "",
        "test_merging_directory.py",
    ),
    (
        "cli/_signals.py",
        "            signal.signal(each, signal.SIG_IGN)",
        "            pass",
        "test_merging_directory.py",
    ),
    (
        "report/stock_config.py",
        "key=lambda entry: order.index(entry.model)",
        "key=lambda entry: -order.index(entry.model)",
        "test_report_stock_config.py",
    ),
]


def survives(copy: Path, file: str, old: str, new: str, tests: str) -> bool:
    """Return whether the tests pass although a file of the copy is wrong."""
    path = copy / "mergekit_metagpt" / file
    right = path.read_text(encoding="utf-8")
    if right.count(old) != 1:
        raise SystemExit(f"{file} has {old!r} {right.count(old)} times, not once; mend its mutant.")
    path.write_text(right.replace(old, new), encoding="utf-8")
    try:
        return not _fails(copy, tests)
    finally:
        path.write_text(right, encoding="utf-8")


def _fails(copy: Path, tests: str) -> bool:
    words = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", f"tests/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # the tests have not run
        raise SystemExit(f"{tests} cannot run:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def main(word: str = "") -> int:
    """Try the mutants; return how many survive, at most 1."""
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(place, name))
        for file, old, new, tests in MUTANTS:
            if word in file:
                alive = survives(Path(place), file, old, new, tests)
                survivors += alive
                print("SURVIVES" if alive else "killed", file, repr(new), tests, flush=True)
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
