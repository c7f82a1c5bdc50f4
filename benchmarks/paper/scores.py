"""What was measured: a JSON file for each row and column, which a later run takes up again."""

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
    """The scores that lie in a directory, for one way of measuring.

    Attributes:
        out: the directory.
        task_folder: YAML tasks to take instead of lm-eval's own.
        limit: questions per task; all of them when None.
        unsafe_code: whether tasks may run what the model writes.
    """

    out: Path
    task_folder: Path | None
    limit: int | None
    unsafe_code: bool

    def stored(self, row: Row, column: Column) -> float:
        """Return a score in %; nan if it was not measured, or with other models or settings."""
        path = self._path(row, column)
        if not path.exists():
            return math.nan
        result = json.loads(path.read_text("utf-8"))
        return result["score"] if result["settings"] == self._settings(row, column) else math.nan

    def missing(self, row: Row, columns: Iterable[Column]) -> list[Column]:
        """Return the columns still to be measured, of those that can be and may be."""
        return [
            column
            for column in columns
            if column.tasks
            and (self.unsafe_code or not column.runs_code)
            and math.isnan(self.stored(row, column))
        ]

    def load_tasks(self, column: Column) -> None:
        """Load a column's tasks and data, to fail before anything is merged."""
        from benchmarks.harness import load_tasks

        load_tasks(column.tasks, self.task_folder, self.unsafe_code)

    def measure(self, row: Row, column: Column, checkpoint: str) -> float:
        """Measure a checkpoint with lm-eval, and store and return the score in %."""
        import torch

        from benchmarks.harness import evaluate

        on_gpu = torch.cuda.is_available()
        metrics = evaluate(
            checkpoint,
            column.tasks,
            task_folder=self.task_folder,
            shots=column.shots,
            shot_answer=column.shot_answer,
            limit=self.limit,
            device="cuda" if on_gpu else "cpu",
            batch_size="auto" if on_gpu else 1,  # auto fills the memory that it finds
            unsafe_code=self.unsafe_code,
            progress=True,
        )
        score = 100 * fmean(result[column.metric] for result in metrics.values())
        result = {"score": score, "settings": self._settings(row, column), "metrics": metrics}
        self._write(self._path(row, column), result)
        return score

    def _path(self, row: Row, column: Column) -> Path:
        # A short look must not replace a score that took hours.
        part = f"-first-{self.limit}" if self.limit else ""
        return self.out / row.folder / f"{column.name}{part}.json"

    def _settings(self, row: Row, column: Column) -> dict[str, Any]:
        """Return all that a score depends on, as JSON gives it back."""
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
        """Write a file that is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, path)
