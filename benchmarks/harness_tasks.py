"""Tasks for lm-eval, written as YAML with their data beside it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Example(NamedTuple):
    """A prompt such as ``reverse 1 2 3 =`` and its answer, such as ``3 2 1``."""

    prompt: str
    answer: str


def write_answers(folder: Path, name: str, examples: Iterable[Example]) -> None:
    """Write a task that scores the answer to each prompt, after a space.

    ``acc`` is the share of examples for which greedy decoding gives the answer. The logarithm of
    ``perplexity`` is the answer's negative log-likelihood in nats, as a mean over examples.
    """
    _write(
        folder,
        name,
        (example._asdict() for example in examples),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": " {{answer}}",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
    )


def write_text(folder: Path, name: str, passages: Iterable[str]) -> None:
    """Write a task that scores whole passages; ``word_perplexity`` is per word of them."""
    _write(
        folder,
        name,
        ({"passage": passage} for passage in passages),
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{passage}}",
            "metric_list": [
                {
                    "metric": "word_perplexity",
                    "aggregation": "weighted_perplexity",
                    "higher_is_better": False,
                }
            ],
        },
    )


def _write(
    folder: Path, name: str, documents: Iterable[Mapping[str, str]], definition: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents), "utf-8")
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    data.with_suffix(".yaml").write_text(yaml.safe_dump({**task, **definition}), "utf-8")
