"""Scores of checkpoints on tasks of lm-eval."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mergekit_metagpt.evaluation.harness import evaluate, load_tasks
from mergekit_metagpt.evaluation.scores import figures_of

# By task, then by `metric,filter`, such as "acc,none".
Metrics = dict[str, dict[str, float]]


def score(
    checkpoint: Path | str,
    tasks: Sequence[str],
    task_folder: Path | None = None,
    *,
    shots: int | None = None,
    shot_answer: str | None = None,
    limit: int | None = None,
    unsafe_code: bool = False,
    progress: bool = False,
    **model_args: Any,
) -> Metrics:
    """Return the figures of a checkpoint on tasks of lm-eval.

    Args:
        checkpoint: a directory with model and tokenizer, or a name on the hub.
        tasks: names of tasks or groups of lm-eval.
        task_folder: a folder of YAML tasks, which replace lm-eval's own of the same names.
        shots: the number of solved examples before each question; None takes the task's own.
        shot_answer: a Jinja template for their answers, if the task's own fails.
        limit: the number of first questions per task; None uses all.
        unsafe_code: allow tasks that execute code written by the model, if they could be loaded.
        progress: show lm-eval's progress bars and warnings.
        model_args: other arguments of lm-eval's class ``HFLM``, such as device and batch_size.
    """
    shown = sys.stderr if progress else io.StringIO()
    with redirect_stderr(shown), redirect_stdout(shown):
        loaded = load_tasks(tasks, task_folder)
        for task in loaded["tasks"].values() if shot_answer else ():
            task.fewshot_cfg.doc_to_target = shot_answer
        model = {"pretrained": str(checkpoint), **model_args}
        report = evaluate(model, loaded, shots, limit=limit, confirm_run_unsafe_code=unsafe_code)
    return {task: figures_of(result) for task, result in report["results"].items()}
