"""The scores of a results file, as metadata of a model card."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from mergekit_metagpt.evaluation.results import Results
from mergekit_metagpt.wording import BadInputError

_LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"


def read_scores(file: Path, out: Path) -> tuple[list[EvalResult], list[str] | None]:
    """Return the scores of a merge, and the fingerprints of its weights if the file has them.

    Args:
        file: a ``results_*.json`` of lm-eval.
        out: the directory of the merge.

    Raises:
        BadInputError: if it is no such file, or is about a model with another name.
    """
    results = Results.read(file)
    model_args = results.config.get("model_args") or {}
    if isinstance(model_args, str):  # as they were given to lm_eval
        model_args = dict(pair.partition("=")[::2] for pair in model_args.split(","))
    scored = str(model_args.get("pretrained", ""))
    if Path(scored).name != out.absolute().name:
        raise BadInputError(
            f"{file} holds the scores of {scored or 'an unknown model'}, not of {out}; name the "
            f"results of {out.absolute().name}."
        )
    made_here = results.config.get("metagpt") or {}
    return list(_eval_results(results)), made_here.get("files")


def _eval_results(results: Results) -> Iterator[EvalResult]:
    """Yield every figure of the tasks and groups that are no part of another group."""
    members = {name for names in results.group_subtasks.values() for name in names}
    for task in results.results:
        if task in members:
            continue
        definition = results.configs.get(task, {})
        path = str(definition.get("dataset_path", ""))
        on_hub = "/" in path  # else a loader such as json, with files of one's own
        shown = {"num_few_shot": results.shots.get(task), "limit": results.config.get("limit")}
        for key, value in results.metrics(task).items():
            metric, _, filtered = key.partition(",")
            if math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=path if on_hub else task,
                    dataset_name=task,
                    dataset_config=_text(definition.get("dataset_name")) if on_hub else None,
                    dataset_split=_text(
                        definition.get("test_split") or definition.get("validation_split")
                    ),
                    dataset_args={name: it for name, it in shown.items() if it is not None},
                    metric_type=metric,
                    metric_name=metric if filtered == "none" else f"{metric} ({filtered})",
                    metric_value=value,
                    source_name="lm-eval",
                    source_url=_LM_EVAL,
                )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
