"""The tasks of tasks.yaml: their prompts and answers, split into training, validation and test."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from benchmarks.harness_tasks import Example
from benchmarks.language_model.sources import SOURCES, Record

DEFINITIONS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("tasks.yaml").read_text("utf-8")
)

_WORDS = 20  # of a field in a prompt: longer ones are cut, because time grows with the tokens


class Splits(NamedTuple):
    """The examples of a task; no two have the same prompt."""

    validation: list[Example]
    test: list[Example]
    training: list[Example]


def splits(
    task: str, definition: Mapping[str, Any], folder: Path, validation: int, test: int
) -> Splits:
    """Return a task's examples in an order that depends on the task's name only.

    Args:
        task: the name of the task.
        definition: its entry in tasks.yaml.
        folder: where the source keeps what it downloads.
        validation: the number of validation examples.
        test: the number of test examples.

    Raises:
        ClickException: if the source has too few examples.
    """
    ((source, arguments),) = definition["source"].items()
    records = SOURCES[source](folder, **arguments)
    examples = list(_drawn(records, definition, random.Random(task)))
    kept = validation + test
    if len(examples) <= kept:
        raise click.ClickException(
            f"Task {task} needs more than {kept} examples, and its source, {source}, has "
            f"{len(examples)}. For debian, run `apt-get update` first; else correct the task in "
            "benchmarks/language_model/tasks.yaml."
        )
    return Splits(examples[:validation], examples[validation:kept], examples[kept:])


def stream(examples: list[Example], seed: int) -> Iterator[Example]:
    """Yield training examples without end, in a new order for each seed and round."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(examples, len(examples))


def _drawn(
    records: Iterable[Record], definition: Mapping[str, Any], draw: random.Random
) -> Iterator[Example]:
    """Yield distinct examples in random order, in turn for each answer while there are any."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in _examples(records, definition):
        groups[example.answer if "answers" in definition else ""].append(example)
    for group in groups.values():
        draw.shuffle(group)
    for turn in zip_longest(*groups.values()):
        examples = [example for example in turn if example]
        yield from draw.sample(examples, len(examples))


def _examples(records: Iterable[Record], definition: Mapping[str, Any]) -> Iterator[Example]:
    """Yield an example for each record that has all fields and an answer."""
    seen = set()
    for record in records:
        value = record[definition["answer"]]
        answer = definition["answers"].get(value) if "answers" in definition else value
        short = {field: " ".join(text.split()[:_WORDS]) for field, text in record.items()}
        try:
            prompt = definition["prompt"].format(**short)
        except KeyError:  # this record lacks a field
            continue
        key = record.get(definition.get("distinct", ""), prompt)
        if answer and key not in seen:
            seen.add(key)
            yield Example(prompt, answer)
