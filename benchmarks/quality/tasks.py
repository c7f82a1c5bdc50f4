"""Four tasks of different kinds, on digits, and their held-out examples as tasks of lm-eval."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from benchmarks.harness_tasks import Example, write_answers

SPLITS = ("validation", "test")

_DIGITS = "0123456789"
_FACTS = 256


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
    """Write each task and split into ``folder`` as a task of lm-eval named ``TASK_SPLIT``."""
    for task in TASKS:
        for split, examples in held_out(task, seed, count).items():
            write_answers(folder, f"{task}_{split}", examples)
