"""Run lm-eval in this process on a checkpoint; needs `mergekit-metagpt[evaluate]`."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from mergekit_metagpt.wording import BadInputError, instead


def evaluate(
    checkpoint: Path | str,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    shots: int | None = None,
    shot_answer: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    batch_size: int | str = 1,
    unsafe_code: bool = False,
    progress: bool = False,
    **model_args: Any,
) -> dict[str, Any]:
    """Score a checkpoint on tasks of lm-eval, and return lm-eval's report.

    This is `lm_eval.simple_evaluate` without its record of the environment, which takes ten
    times as long as a small task.

    Args:
        checkpoint: a directory with model and tokenizer, or a name on the hub.
        tasks: names of tasks or groups of lm-eval; see :func:`load_tasks`.
        task_folder: a folder of YAML tasks of one's own.
        shots: the number of solved examples before each question; None takes the task's own.
        shot_answer: a Jinja template for the answers of solved examples, if the task's own fails.
        limit: the number of first questions per task; None uses all.
        device: a torch device.
        batch_size: sequences per forward pass; "auto" finds the largest that fits.
        unsafe_code: allow tasks that execute code written by the model (HumanEval, MBPP).
        progress: show lm-eval's progress bars and warnings.
        model_args: other arguments of lm-eval's class ``HFLM``.
    """
    shown = sys.stderr if progress else io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        loaded = load_tasks(tasks, task_folder, unsafe_code)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot") or 0
            task.set_config("num_fewshot", own if shots is None else shots)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            if shot_answer:
                task.fewshot_cfg.doc_to_target = shot_answer
        report: dict[str, Any] = lm_eval.evaluate(
            lm=HFLM(pretrained=str(checkpoint), device=device, batch_size=batch_size, **model_args),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            confirm_run_unsafe_code=unsafe_code,
        )
    return report


def load_tasks(
    tasks: Sequence[str], task_folder: Path | None = None, unsafe_code: bool = False
) -> TaskDict:
    """Load tasks and their data as :func:`evaluate` does, to fail early if one cannot be loaded.

    The YAML tasks of a folder replace lm-eval's own of the same names. With ``dataset_path: json``
    and absolute ``data_files``, the hub is not used.

    Raises:
        BadInputError: if a task does not exist.
        Exception: any error of a task's own code, such as missing data.
    """
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read when the task is imported
    manager = _task_manager(task_folder, task_folder is None)
    if not set(tasks) <= set(manager.all_tasks):
        manager = _task_manager(task_folder, True)
    known = {*manager.all_groups, *manager.all_subtasks}
    unknown = [f"lm-eval has no task {t}; {instead(t, known)}." for t in tasks if t not in known]
    if unknown:
        raise BadInputError(*unknown)
    return manager.load(list(tasks))


@cache
def _task_manager(folder: Path | None, with_own: bool) -> TaskManager:
    """Index the folder's tasks, and lm-eval's own. Those are thousands and take seconds."""
    return TaskManager(include_path=folder, include_defaults=with_own)
