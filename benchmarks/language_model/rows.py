"""The merges to compare: a table's rows."""

from typing import Any, NamedTuple

from benchmarks.stock_merge import Method

_DENSE = {"density": 0.55}  # as in the paper
# Divided by their sum, so that the weights are 1/T each.
_EQUAL = {"weight": 1.0, "normalize": True}


class Row(NamedTuple):
    """A merge.

    Attributes:
        name: the name of the row.
        method: MergeKit's merge method.
        parameters: its parameters; the others have MergeKit's defaults.
    """

    name: str
    method: str
    parameters: dict[str, Any]

    @property
    def merge(self) -> Method:
        """What to merge with."""
        return self.method, self.parameters


AVERAGE = Row("weight average", "linear", {"weight": 1.0})
ARITHMETIC = Row("task arithmetic, 0.3", "task_arithmetic", {"weight": 0.3})
TIES = Row("TIES", "ties", {**_EQUAL, **_DENSE})

# What MergeKit 0.1.5 offers for any number of experts.
STOCK = [
    AVERAGE,
    ARITHMETIC,
    TIES,
    Row("DARE", "dare_linear", {**_EQUAL, **_DENSE}),
    Row("DELLA", "della_linear", {**_EQUAL, **_DENSE}),
    Row("breadcrumbs", "breadcrumbs", {**_EQUAL, **_DENSE}),
    Row("SCE", "sce", {}),
    Row("Model Stock", "model_stock", {}),
    Row("Karcher mean", "karcher", {}),
    Row("multi-SLERP", "multislerp", {"weight": 1.0}),
    Row("RAM", "ram", {}),
    Row("RAM+", "ramplus_tl", {}),
]
METAGPT = [
    Row(f"MetaGPT, {granularity}", "metagpt", {"granularity": granularity})
    for granularity in ("tensor", "layer", "model", "direction")
]
# What `direction` can be set to. The best on the validation examples of one family is a row.
CHOSEN = "MetaGPT, direction, chosen"
_SETTINGS = [  # side, exponent, isotropy
    *((side, 0, rho) for side in ("input", "output") for rho in (0.003, 0.01, 0.03, 0.1, 0.3)),
    *((side, 2, rho) for side in ("input", "output") for rho in (0.01, 0.1)),
    *(("both", 0, rho) for rho in (0.01, 0.1)),
]
DIRECTIONS = [
    Row(
        f"MetaGPT, direction, {side}, exponent {exponent}, isotropy {isotropy}",
        "metagpt",
        {
            "granularity": "direction",
            "side": side,
            "exponent": exponent,
            "isotropy": isotropy,
        },
    )
    for side, exponent, isotropy in _SETTINGS
]
ROWS = [*STOCK, *METAGPT]
QUICK_ROWS = [AVERAGE, ARITHMETIC, TIES, *METAGPT]

# Task arithmetic with one coefficient, chosen by the loss on validation examples.
GRID = [
    Row(f"task arithmetic, {weight}", "task_arithmetic", {"weight": weight})
    for weight in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
]
BEST_OF_GRID = "task arithmetic, best of grid"
