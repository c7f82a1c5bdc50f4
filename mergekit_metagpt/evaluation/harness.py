"""Run lm-eval in this process on a checkpoint; needs `mergekit-metagpt[evaluate]`."""

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
    unknown = [f"lm-eval has no task {n}; {instead(n, known)}." for n in names if n not in known]
    if unknown:
        raise BadInputError(*unknown)
    return manager.load(list(names))


@cache
def _task_manager(folder: Path | None, with_own: bool) -> TaskManager:
    """Index the folder's tasks, and lm-eval's own. Those are thousands and take seconds."""
    return TaskManager(include_path=folder, include_defaults=with_own)
