"""Run lm-eval in this process on a checkpoint; needs `mergekit-metagpt[benchmarks]`."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import lm_eval
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict


def evaluate(
    checkpoint: Path | str,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    shots: int = 0,
    shot_answer: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
    batch_size: int | str = 1,
    unsafe_code: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a checkpoint on tasks of lm-eval.

    This is `lm_eval.simple_evaluate` without its record of the environment, which takes ten
    times as long as a small task.

    Args:
        checkpoint: a directory with model and tokenizer, or a name on the hub. It is loaded in
            its stored dtype.
        tasks: names of tasks or groups of lm-eval.
        task_folder: a folder of YAML tasks that replace lm-eval's own. With
            ``dataset_path: json`` and absolute ``data_files``, the hub is not used.
        shots: the number of solved examples before each question; overrides the task's default.
        shot_answer: a Jinja template for the answers of solved examples, if the task's own fails.
        limit: use only this number of first questions per task; None uses all.
        device: a torch device.
        batch_size: sequences per forward pass; "auto" finds the largest that fits.
        unsafe_code: allow tasks that execute code written by the model (HumanEval, MBPP).
        progress: show lm-eval's progress bars and warnings.

    Returns:
        For each name in ``tasks``, lm-eval's metrics by ``metric,filter``, such as "acc,none" or
        "perplexity,none", without standard errors.

    Raises:
        KeyError: if a task does not exist.
        ValueError: if a task runs code and ``unsafe_code`` is not set.
    """
    with _redirected(sys.stderr if progress else io.StringIO()):
        loaded = load_tasks(tasks, task_folder, unsafe_code)
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            if shot_answer:
                task.fewshot_cfg.doc_to_target = shot_answer
        report = lm_eval.evaluate(
            lm=HFLM(pretrained=str(checkpoint), device=device, batch_size=batch_size),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            confirm_run_unsafe_code=unsafe_code,
        )
    return {name: _metrics(report["results"][name]) for name in tasks}


@contextlib.contextmanager
def _redirected(stream: TextIO) -> Iterator[None]:
    """Send all output of lm-eval to one stream, also what it prints to stdout."""
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        yield


def load_tasks(
    tasks: Sequence[str], task_folder: Path | None = None, unsafe_code: bool = False
) -> TaskDict:
    """Load tasks and their data as :func:`evaluate` does, to fail early if one cannot be loaded.

    Raises:
        KeyError: if a task does not exist.
        Exception: any error of a task's own code, such as missing data.
    """
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read when the task is imported
    return _task_manager(task_folder).load(list(tasks))


@cache
def _task_manager(folder: Path | None) -> TaskManager:
    """Index the folder's tasks, or lm-eval's own. Those are thousands and take seconds."""
    return TaskManager(include_path=folder, include_defaults=folder is None)


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics only, without names, sizes and standard errors."""
    return {
        key: float(value) for key, value in result.items() if "," in key and "_stderr," not in key
    }
