"""The only place that runs lm-eval: on a checkpoint, and on the models of a merge, each once.

It runs in this process, and needs `mergekit-metagpt[evaluate]`.
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.evaluation.scores import Score
from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.measure.loaders import weight_files
from mergekit_metagpt.measure.vocabularies import TOKENIZER_FILES
from mergekit_metagpt.wording import BadInputError, instead, reason

# What decides, beside the weights, how a model computes, reads and writes.
_DESCRIBING = (*TOKENIZER_FILES, "*config.json", "*_tokens*.json", "*.jinja", "*.py")


def evaluate(model: dict[str, Any], tasks: TaskDict, shots: int | None, **settings: Any) -> Any:
    """Return lm-eval's report on a model, given by the arguments of lm-eval's class ``HFLM``.

    Like `lm_eval.simple_evaluate`, but the environment is not recorded, which takes seconds, and
    ``shots`` takes the place of a task's own 0, too. With None, each task has its own number of
    solved examples. ``settings`` are other ones of `lm_eval.evaluate`, such as limit.
    """
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot") or 0
        task.set_config("num_fewshot", own if shots is None else shots)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    fixed: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": False}
    return lm_eval.evaluate(lm=HFLM(**model), task_dict=tasks, **fixed, **settings)


def load_tasks(names: Sequence[str], folder: Path | None = None) -> TaskDict:
    """Load tasks or groups of lm-eval with their data.

    The YAML tasks of a folder replace lm-eval's own of the same names. With ``dataset_path: json``
    and absolute ``data_files``, the hub is not used.

    Raises:
        BadInputError: if a task does not exist; else whatever a task's own code raises.
    """
    manager = _task_manager(folder, folder is None)
    if not set(names) <= set(manager.all_tasks):
        manager = _task_manager(folder, True)
    known = {*manager.all_groups, *manager.all_subtasks}
    way = "correct its name, or name the folder of its own YAML (--include-path)"
    unknown = [
        f"lm-eval has no task {n}; {instead(n, known, way)}." for n in names if n not in known
    ]
    if unknown:
        raise BadInputError(*unknown)
    return manager.load(list(names))


@cache
def _task_manager(folder: Path | None, with_own: bool) -> TaskManager:
    """Index the folder's tasks, and lm-eval's own. Those are thousands and take seconds."""
    return TaskManager(include_path=folder, include_defaults=with_own)


@dataclass(frozen=True)
class Bench:
    """Tasks, how they are run, and where the results are."""

    options: MergeOptions
    progress: bool
    folder: Path  # of the results, laid out as by ``lm_eval --output_path``
    tasks: Sequence[str]
    task_folder: Path | None
    deciding: dict[str, Any]  # what the scores depend on: shots and limit
    batch_size: str

    def score(self, name: str, model: ModelReference) -> dict[str, Score]:
        """Return a model's scores by task; measure those that are missing, and write them."""
        known = self._scores(model)
        missing = [task for task in self.tasks if task not in known]
        if not missing:
            return known
        if not self.options.quiet:
            click.echo(f"Scoring {name}", err=True)
        named = {
            "pretrained": model.model.path,
            "revision": model.model.revision,
            "peft": model.lora and model.lora.path,
            "trust_remote_code": self.options.trust_remote_code,
        }
        model_args = {key: value for key, value in named.items() if value}
        hardware = {"batch_size": self.batch_size, "device": self.options.device or "cpu"}
        tracker = EvaluationTracker(output_path=str(self.folder))
        tracker.general_config_tracker.log_experiment_args("hf", model_args, None, None, False)
        shown = sys.stderr if self.progress else io.StringIO()
        try:
            with redirect_stderr(shown), redirect_stdout(shown):
                loaded = load_tasks(missing, self.task_folder)
                report = evaluate({**model_args, **hardware}, loaded, **self.deciding)
        except BadInputError:
            raise
        except Exception as error:  # of the model, or of a task's own code or data
            raise RuntimeError(
                f"lm-eval could not score {model} on {', '.join(missing)} ({reason(error)}); run "
                "it again with --verbose for the traceback."
            ) from error
        report["lm_eval_version"] = lm_eval.__version__
        used = {"model": "hf", "model_args": model_args, **self.deciding, **hardware}
        report["config"] = {**used, "metagpt": self._settings(model)}
        tracker.save_results_aggregated(report)  # logs its failures
        scores = self._scores(model)
        if not scores.keys() >= set(missing):
            raise OSError(
                f"The results of {model} could not be written to {self.folder}; make it writable, "
                "and run it again."
            )
        return scores

    def _scores(self, model: ModelReference) -> dict[str, Score]:
        """Return a model's scores by task, so far; it is recognized by the content of its files."""
        settings, scores = self._settings(model), dict[str, Score]()
        for file in sorted(self.folder.glob("*/results_*.json"), key=lambda path: path.name):
            try:
                report = json.loads(file.read_bytes())
                if report["config"].get("metagpt") == settings:
                    done = [task for task in self.tasks if task in report["results"]]
                    scores |= {task: Score.of(task, report, file) for task in done}
            except BadInputError:
                raise
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # a run was killed while it wrote, or it is another's file
        return scores

    def _settings(self, model: ModelReference) -> dict[str, Any]:
        """Return what the scores of a model depend on, as JSON types."""
        folder = self.task_folder
        tasks = folder.rglob("*.yaml") if folder else ()
        beside = {file for task in tasks for file in task.parent.iterdir() if file.is_file()}
        loader = LoaderCache().get(model)
        files = weight_files(loader)
        for place in {loader.index.base_path, model.model.path}:  # with an adapter, and without
            found = (file for name in _DESCRIBING for file in Path(place).glob(name))
            files += filter(Path.is_file, found)
        return {
            "files": sorted(set(map(sha256_of, files))),
            "task_files": {str(file.relative_to(str(folder))): sha256_of(file) for file in beside},
            "lm_eval": lm_eval.__version__,
            **self.deciding,
        }
