"""lm-eval, in this process, on a checkpoint directory: needs `mergekit-metagpt[benchmarks]`."""

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
    times as long as a small task does.

    Args:
        checkpoint: a directory with model and tokenizer, or a name on the hub. It is loaded in
            the dtype that it is stored in.
        tasks: names of tasks or groups of lm-eval.
        task_folder: a folder of YAML tasks to take instead of lm-eval's own. With
            ``dataset_path: json`` and absolute ``data_files`` nothing is asked of the hub.
        shots: solved examples in front of each question, whatever the task's own default is.
        shot_answer: a Jinja template of the answer to a solved example, where a task's own fails.
        limit: questions per task, the first ones; all of them when None.
        device: a torch device.
        batch_size: sequences per forward pass; "auto" finds the largest that fits.
        unsafe_code: let tasks that run what the model writes (HumanEval, MBPP) do so.
        progress: show lm-eval's progress bars and warnings.

    Returns:
        For each name in ``tasks`` lm-eval's metrics by ``metric,filter``, such as "acc,none" or
        "perplexity,none", without standard errors.

    Raises:
        KeyError: if there is no such task.
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
    """Send all that lm-eval says to one stream; it prints some of it."""
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        yield


def load_tasks(
    tasks: Sequence[str], task_folder: Path | None = None, unsafe_code: bool = False
) -> TaskDict:
    """Load tasks and their data, as :func:`evaluate` does; to find out early that one cannot be.

    Raises:
        KeyError: if there is no such task.
        Exception: what a task's own code or data raise when they are missing.
    """
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read when such a task is imported
    return _task_manager(task_folder).load(list(tasks))


@cache
def _task_manager(folder: Path | None) -> TaskManager:
    """Index the folder's tasks, or lm-eval's own: thousands, which takes seconds."""
    return TaskManager(include_path=folder, include_defaults=folder is None)


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Leave out what is not a metric: names, sizes and standard errors."""
    return {
        key: float(value) for key, value in result.items() if "," in key and "_stderr," not in key
    }
