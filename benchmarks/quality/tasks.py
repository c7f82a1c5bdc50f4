"""Four tasks of different kinds, on digits, and their held-out examples as tasks of lm-eval."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import yaml

SPLITS = ("validation", "test")

_DIGITS = "0123456789"
_FACTS = 256


class Example(NamedTuple):
    """A prompt such as ``reverse 1 2 3 =`` and its answer, such as ``3 2 1``."""

    prompt: str
    answer: str


def _example(task: str, given: str, answer: str) -> Example:
    return Example(f"{task} {' '.join(given)} =", " ".join(answer))


def _reverse(draw: random.Random) -> Example:
    """A transformation of a string: twelve digits in reverse order."""
    digits = draw.choices(_DIGITS, k=12)
    return _example("reverse", "".join(digits), "".join(digits[::-1]))


def _triple(draw: random.Random) -> Example:
    """Arithmetic: three times a six-digit number, modulo 10^6, with the last digit first."""
    number = draw.randrange(10**6)
    return _example("triple", f"{number:06d}", f"{3 * number % 10**6:06d}"[::-1])


def _majority(draw: random.Random) -> Example:
    """Classification: the more frequent of two digits in a string of fifteen."""
    digits = draw.choices(draw.sample(_DIGITS, 2), k=15)
    return _example("majority", "".join(digits), max(set(digits), key=digits.count))


def _facts() -> dict[str, str]:
    draw = random.Random("facts")
    return {f"{key:03d}": f"{draw.randrange(1000):03d}" for key in draw.sample(range(1000), _FACTS)}


_VALUES = _facts()


def _recall(draw: random.Random) -> Example:
    """Knowledge: the three digits that belong to a key, which can only be memorized."""
    key = draw.choice(list(_VALUES))
    return _example("recall", key, _VALUES[key])


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "reverse": _reverse,
    "triple": _triple,
    "recall": _recall,
    "majority": _majority,
}


def held_out(task: str, seed: int, count: int) -> dict[str, list[Example]]:
    """Draw ``count`` examples for each of ``SPLITS``, all different."""
    draw = random.Random(f"{seed}/{task}/held out")
    drawn: dict[Example, None] = {}
    while len(drawn) < len(SPLITS) * count:
        drawn[TASKS[task](draw)] = None
    examples = iter(drawn)
    return {split: list(islice(examples, count)) for split in SPLITS}


def training(task: str, seed: int, model: str, count: int) -> Iterator[Example]:
    """Draw examples without end, but no held-out ones.

    Only ``recall`` also trains on its held-out examples, because facts can only be memorized.

    Args:
        task: one of ``TASKS``.
        seed: the seed of the family.
        model: the model to train; different models get different examples.
        count: the number of held-out examples in a split.
    """
    draw = random.Random(f"{seed}/{task}/{model}")
    splits = {} if task == "recall" else held_out(task, seed, count)
    kept = {example for examples in splits.values() for example in examples}
    while True:
        example = TASKS[task](draw)
        if example not in kept:
            yield example


def write_harness_tasks(folder: Path, seed: int, count: int) -> None:
    """Write each task and split into ``folder`` as a task of lm-eval named ``TASK_SPLIT``.

    ``acc`` is the share of examples for which greedy decoding gives the answer. The logarithm of
    ``perplexity`` is the answer's negative log-likelihood in nats, as a mean over examples.
    """
    folder.mkdir()
    for task in TASKS:
        for split, examples in held_out(task, seed, count).items():
            data = folder / f"{task}_{split}.jsonl"
            lines = (json.dumps(example._asdict()) for example in examples)
            data.write_text("\n".join(lines), "utf-8")
            definition = _harness_task(data, folder / "cache")
            data.with_suffix(".yaml").write_text(yaml.safe_dump(definition), "utf-8")


def _harness_task(data: Path, cache: Path) -> dict[str, object]:
    return {
        "task": data.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(cache)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    }
