"""Scores models with lm-eval, and keeps its results files, so that none is made twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from mergekit.common import ModelReference

from mergekit_metagpt.evaluation.harness import evaluate, load_tasks
from mergekit_metagpt.evaluation.results import Results
from mergekit_metagpt.planning.fingerprints import fingerprint, fingerprints_of, weight_files
from mergekit_metagpt.wording import BadInputError, reason


@dataclass(frozen=True)
class Bench:
    """Tasks, the settings of a run, and where its results are kept.

    Attributes:
        folder: where the results are, laid out as by ``lm_eval --output_path``.
        tasks: names of tasks or groups of lm-eval.
        task_folder: a folder of YAML tasks, which replace lm-eval's own of the same names.
        shots: the number of solved examples before each question; None takes the task's own.
        limit: use only this number of first questions per task; None uses all.
        batch_size: sequences per forward pass; "auto" finds the largest that fits.
        device: a torch device.
        trust_remote_code: run code that belongs to a model.
        progress: show lm-eval's progress bars and warnings.
    """

    folder: Path
    tasks: Sequence[str]
    task_folder: Path | None = None
    shots: int | None = None
    limit: int | None = None
    batch_size: str = "1"
    device: str = "cpu"
    trust_remote_code: bool = False
    progress: bool = False

    def missing(self, model: ModelReference) -> list[str]:
        """Return the tasks that a model has not been scored on with these settings."""
        known = self.kept(model)
        return [task for task in self.tasks if task not in known]

    def kept(self, model: ModelReference) -> dict[str, tuple[Path, Results]]:
        """Return by task the results of a model, whose weights are recognized by their content."""
        settings = self._settings(model)
        found: dict[str, tuple[Path, Results]] = {}
        for file in sorted(self.folder.glob("*/results_*.json"), key=lambda path: path.name):
            try:
                results = Results.read(file)
            except BadInputError:
                continue  # a run was killed while it wrote the file
            if results.config.get("metagpt") == settings:
                found |= {task: (file, results) for task in results.results if task in self.tasks}
        return found

    def require_tasks(self) -> None:
        """Load the tasks and their data, to fail before anything is scored.

        Raises:
            BadInputError: if one does not exist, cannot be loaded, or runs the model's code.
        """
        try:
            loaded = load_tasks(self.tasks, self.task_folder)["tasks"]
        except BadInputError:
            raise
        except Exception as error:  # whatever a task's own code raises
            raise BadInputError(
                f"lm-eval cannot load {', '.join(self.tasks)} ({reason(error)}); correct the "
                "task, or check the connection."
            ) from error
        unsafe = [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise BadInputError(
                f"Task {unsafe[0]} executes code that the model writes; leave it out, and run it "
                "with lm_eval --confirm_run_unsafe_code where that is safe."
            )

    def score(self, model: ModelReference) -> None:
        """Score a model on the tasks that are missing, and keep the results.

        Raises:
            RuntimeError: if lm-eval fails.
            OSError: if the results could not be written.
        """
        missing = self.missing(model)
        model_args: dict[str, Any] = {"pretrained": model.model.path}
        model_args |= {"revision": model.model.revision} if model.model.revision else {}
        model_args |= {"peft": model.lora.path} if model.lora else {}
        model_args |= {"trust_remote_code": True} if self.trust_remote_code else {}
        tracker = EvaluationTracker(output_path=str(self.folder))
        tracker.general_config_tracker.log_experiment_args("hf", model_args, None, None, False)
        others = {name: value for name, value in model_args.items() if name != "pretrained"}
        try:
            report = evaluate(
                model.model.path,
                missing,
                task_folder=self.task_folder,
                shots=self.shots,
                limit=self.limit,
                device=self.device,
                batch_size=self.batch_size,
                progress=self.progress,
                **others,
            )
        except Exception as error:  # of the model, or of a task's own code
            raise RuntimeError(
                f"lm-eval could not score {model} on {', '.join(missing)} ({reason(error)})."
            ) from error
        report["config"] = {
            "model": "hf",
            "model_args": model_args,
            "batch_size": self.batch_size,
            "device": self.device,
            "limit": self.limit,
            "metagpt": self._settings(model),
        }
        report["lm_eval_version"] = lm_eval.__version__
        tracker.save_results_aggregated(report)  # logs its failures
        if self.missing(model):
            raise OSError(f"The results of {model} could not be written to {self.folder}.")

    def _settings(self, model: ModelReference) -> dict[str, Any]:
        """Return what the scores of a model depend on, as JSON types."""
        return {
            "files": fingerprints_of(weight_files(model)),
            "task_files": self._task_files,
            "shots": self.shots,
            "limit": self.limit,
            "lm_eval": lm_eval.__version__,
        }

    @cached_property
    def _task_files(self) -> dict[str, str]:
        """Fingerprints of the files beside the YAML tasks of the folder, such as their data."""
        if self.task_folder is None:
            return {}
        folders = {path.parent for path in self.task_folder.rglob("*.yaml")}
        files = sorted(file for folder in folders for file in folder.iterdir() if file.is_file())
        return {str(file.relative_to(self.task_folder)): fingerprint(file) for file in files}
