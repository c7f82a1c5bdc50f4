"""Scores models with lm-eval, and keeps its results files, so that none is made twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.evaluation.harness import evaluate
from mergekit_metagpt.evaluation.results import Results
from mergekit_metagpt.measure.identity import sha256_of
from mergekit_metagpt.measure.loaders import weight_files
from mergekit_metagpt.wording import BadInputError, reason


@dataclass(frozen=True)
class Bench:
    """Tasks, the settings of a run as ``harness.evaluate`` takes them, and where its results are.

    The scores depend on the ``deciding`` settings, shots and limit, and not on those of the
    ``hardware``, batch_size and device.
    """

    folder: Path  # laid out as by ``lm_eval --output_path``
    tasks: Sequence[str]
    task_folder: Path | None
    deciding: dict[str, Any]
    hardware: dict[str, Any]
    model_args: dict[str, Any]
    progress: bool

    def missing(self, model: ModelReference) -> list[str]:
        """Return the tasks that a model has not been scored on with these settings."""
        scored = self.results(model)
        return [task for task in self.tasks if task not in scored]

    def results(self, model: ModelReference) -> dict[str, tuple[Path, Results]]:
        """Return the results of a model by task; its weights are recognized by their content."""
        settings = self._settings(model)
        by_task: dict[str, tuple[Path, Results]] = {}
        for file in sorted(self.folder.glob("*/results_*.json"), key=lambda path: path.name):
            try:
                results = Results.read(file)
            except BadInputError:
                continue  # a run was killed while it wrote the file
            if results.config.get("metagpt") == settings:
                by_task |= dict.fromkeys(results.results, (file, results))
        return by_task

    def score(self, model: ModelReference) -> None:
        """Score a model on the tasks that are missing, and write the results."""
        missing, path = self.missing(model), model.model
        named = {"revision": path.revision, "peft": model.lora and model.lora.path}
        own: dict[str, Any] = {key: it for key, it in named.items() if it} | self.model_args
        given = {**self.deciding, **self.hardware}
        tracker = EvaluationTracker(output_path=str(self.folder))
        model_args = {"pretrained": path.path, **own}
        tracker.general_config_tracker.log_experiment_args("hf", model_args, None, None, False)
        try:
            report = evaluate(
                path.path,
                missing,
                task_folder=self.task_folder,
                progress=self.progress,
                **given,
                **own,
            )
        except BadInputError:
            raise
        except Exception as error:  # of the model, or of a task's own code or data
            raise RuntimeError(
                f"lm-eval could not score {model} on {', '.join(missing)} ({reason(error)})."
            ) from error
        settings = {"model": "hf", "model_args": model_args, **given}
        report["config"] = {**settings, "metagpt": self._settings(model)}
        report["lm_eval_version"] = lm_eval.__version__
        tracker.save_results_aggregated(report)  # logs its failures
        if self.missing(model):
            raise OSError(f"The results of {model} could not be written to {self.folder}.")

    def _settings(self, model: ModelReference) -> dict[str, Any]:
        """Return what the scores of a model depend on, as JSON types."""
        return {
            "files": sorted(map(sha256_of, weight_files(LoaderCache().get(model)))),
            "task_files": self._task_files,
            "lm_eval": lm_eval.__version__,
            **self.deciding,
        }

    @cached_property
    def _task_files(self) -> dict[str, str]:
        """The SHA-256 of the files beside the YAML tasks of the folder, such as their data."""
        if self.task_folder is None:
            return {}
        folders = {path.parent for path in self.task_folder.rglob("*.yaml")}
        files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
        return {str(file.relative_to(self.task_folder)): sha256_of(file) for file in files}
