"""Measured scores: a JSON file for each row and column, which later runs reuse."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.paper.tables import Column, Row


@dataclass(frozen=True)
class Scores:
    """The scores in a directory, measured with the same settings.

    Attributes:
        out: the directory.
        task_folder: a folder of YAML tasks that replace lm-eval's own.
        limit: the number of questions per task; None means all.
        unsafe_code: whether tasks may execute code that the model writes.
    """

    out: Path
    task_folder: Path | None
    limit: int | None
    unsafe_code: bool

    def stored(self, row: Row, column: Column) -> float:
        """Return a score in %; nan if it was not measured with these models and settings."""
        path = self._path(row, column)
        if not path.exists():
            return math.nan
        result = json.loads(path.read_text("utf-8"))
        return result["score"] if result["settings"] == self._settings(row, column) else math.nan

    def missing(self, row: Row, columns: Iterable[Column]) -> list[Column]:
        """Return the columns that still need a score, can be measured and may be measured."""
        return [
            column
            for column in columns
            if column.tasks
            and (self.unsafe_code or not column.runs_code)
            and math.isnan(self.stored(row, column))
        ]

    def load_tasks(self, column: Column) -> None:
        """Load a column's tasks and data, so that errors appear before any merge."""
        from mergekit_metagpt.evaluation.harness import load_tasks

        if self.unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read when such a task is imported
        load_tasks(column.tasks, self.task_folder)

    def measure(self, row: Row, column: Column, checkpoint: str) -> float:
        """Measure a checkpoint with lm-eval, and store and return the score in %."""
        import torch

        from benchmarks.harness import score

        on_gpu = torch.cuda.is_available()
        found = score(
            checkpoint,
            column.tasks,
            self.task_folder,
            shots=column.shots,
            shot_answer=column.shot_answer,
            limit=self.limit,
            device="cuda" if on_gpu else "cpu",
            batch_size="auto" if on_gpu else 1,  # auto fills all memory
            unsafe_code=self.unsafe_code,
            progress=True,
        )
        mean = 100 * fmean(found[task][column.metric] for task in column.tasks)
        result = {"score": mean, "settings": self._settings(row, column), "metrics": found}
        self._write(self._path(row, column), result)
        return mean

    def _path(self, row: Row, column: Column) -> Path:
        # A run with a limit must not overwrite a full score that took hours.
        part = f"-first-{self.limit}" if self.limit else ""
        return self.out / row.folder / f"{column.name}{part}.json"

    def _settings(self, row: Row, column: Column) -> dict[str, Any]:
        """Return everything that a score depends on, in types that JSON preserves."""
        return {
            "model": row.source,
            "tasks": column.tasks,
            "metric": column.metric,
            "shots": column.shots,
            "limit": self.limit,
            "task_folder": str(self.task_folder) if self.task_folder else None,
        }

    @staticmethod
    def _write(path: Path, result: dict[str, Any]) -> None:
        """Write a file so that it is either complete or missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, path)
