"""The merges to compare: a table's rows."""

from typing import Any, NamedTuple

_DENSE = {"density": 0.55}  # as in the paper


class Row(NamedTuple):
    """A merge.

    Attributes:
        name: the name of the row.
        method: MergeKit's merge method, or a key of ``rules.RULES``.
        parameters: the method's parameters; the others have MergeKit's defaults.
        tuned: whether each expert gets, as its weight, the best coefficient of ``GRID``.
    """

    name: str
    method: str
    parameters: dict[str, Any]
    tuned: bool = False

    def with_weight(self, weight: float) -> "Row":
        """Return a tuned row with the weight that it is to have; any other as it is."""
        parameters = {**self.parameters, "weight": weight} if self.tuned else self.parameters
        return Row(self.name, self.method, parameters)


# Task arithmetic by its coefficient. The best is chosen by the loss on validation examples.
GRID = [
    Row(f"task arithmetic, {weight}", "task_arithmetic", {"weight": weight})
    for weight in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
]

AVERAGE = Row("weight average", "linear", {"weight": 1.0})
ARITHMETIC = Row("task arithmetic, 0.3", "task_arithmetic", {"weight": 0.3})
TUNED = Row("task arithmetic, tuned", "task_arithmetic", {}, tuned=True)
TENSOR, MODEL, DIRECTION = (
    Row(f"MetaGPT, {granularity}", "metagpt", {"granularity": granularity})
    for granularity in ("tensor", "model", "direction")
)

# At weights that sum to 1, DELLA would be a weight average with noise.
SPARSIFIED = [
    Row("TIES, a tuned sum", "ties", {"normalize": False, **_DENSE}, tuned=True),
    Row("DELLA, tuned", "della_linear", {"normalize": False, **_DENSE}, tuned=True),
]
# Together they take a quarter of an hour for six experts.
ELSEWHERE = [
    Row("TSV-M", "tsv_m", {}),
    Row("WUDI-Merging", "wudi", {}),
    Row("previous direction", "previous", {}),
]
_ALL = [AVERAGE, ARITHMETIC, TUNED, *SPARSIFIED, *ELSEWHERE, TENSOR, MODEL, DIRECTION]
_LEFT_OUT = {
    "even": [],
    "LoRA": [],
    "uneven": ELSEWHERE,
    "long": ELSEWHERE,
}


def rows_of(recipe: str) -> list[Row]:
    """Return the merges of a recipe's families."""
    left_out = _LEFT_OUT.get(recipe, [*SPARSIFIED, *ELSEWHERE, TENSOR])
    return [row for row in _ALL if row not in left_out]
