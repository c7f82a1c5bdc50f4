"""Read the paper's tables from tables.yaml: merges, benchmarks and published figures."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

EXPERTS = ("LM", "Math", "Code")  # the order of the models in the example configs

_DATA = Path(__file__).with_name("tables.yaml")
_EXAMPLES = Path(__file__).parents[2] / "example_configs"


@dataclass(frozen=True)
class Column:
    """A benchmark, and how lm-eval measures it.

    Attributes:
        name: the name in the paper.
        tasks: lm-eval's tasks, whose mean is the score; empty if lm-eval has none.
        metric: lm-eval's ``metric,filter``, a fraction.
        shots: the number of solved examples before each question.
        shot_answer: a template of their answers, if the tasks' own fails.
        expert: the expert whose score the normalized average divides by.
        runs_code: whether the tasks execute code that the model writes.
    """

    name: str
    tasks: list[str]
    metric: str
    shots: int
    shot_answer: str | None = None
    expert: str | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class Row:
    """A model of a table.

    Attributes:
        name: the name in the paper.
        family: the name of the example config that has its models. Rows with the same name
            and family are the same model, also in different tables.
        source: a model's name or path, or the MergeKit config of a merge.
        scores: the published scores in %, in the order of the table's columns.
        averages: the published averages: absolute and, except in table 5, normalized.
    """

    name: str
    family: str
    source: str | dict[str, Any]
    scores: list[float]
    averages: list[float]

    @property
    def folder(self) -> Path:
        """The folder of its results, inside the output folder."""
        return Path(self.family, re.sub("[^a-z0-9]+", "-", self.name.lower()))


@dataclass(frozen=True)
class Table:
    """A table of the paper, with its experts' rows. Table 4 takes them from another table."""

    number: int
    title: str
    columns: list[Column]
    rows: list[Row]
    experts: dict[str, Row]


def table_numbers() -> list[int]:
    """Return the numbers of the tables."""
    return list(_data()["tables"])


def read_table(number: int) -> Table:
    """Return a table of the paper, with the models' names on the hub."""
    data = _data()
    entry = data["tables"][number]
    with_experts = data["tables"][entry.get("experts", number)]
    return Table(
        number,
        entry["title"],
        [Column(name, **data["columns"][name]) for name in entry["columns"]],
        _rows(entry),
        {row.name: row for row in _rows(with_experts) if row.name in EXPERTS},
    )


def _rows(entry: dict[str, Any]) -> list[Row]:
    path = _EXAMPLES / entry["config"]
    config = yaml.safe_load(path.read_text("utf-8"))
    sources = {
        expert: model["model"] for expert, model in zip(EXPERTS, config["models"], strict=True)
    } | {name: {**config, **method} for name, method in _data()["methods"].items()}
    return [
        Row(name, path.stem, sources[name], **figures) for name, figures in entry["rows"].items()
    ]


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(_DATA.read_text("utf-8"))
    return data
