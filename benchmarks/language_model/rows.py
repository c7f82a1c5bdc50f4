"""The merges to compare: a table's rows."""

from typing import Any, NamedTuple

_DENSE = {"density": 0.55}  # as in the paper


class Row(NamedTuple):
    """A merge.

    Attributes:
        name: the name of the row.
        method: MergeKit's merge method.
        parameters: its parameters; the others have MergeKit's defaults.
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
TIES = Row("TIES", "ties", {"weight": 1.0, **_DENSE})

# What MergeKit 0.1.5 offers for any number of experts. At weights that sum to 1, DARE and DELLA
# would be weight averages with noise.
STOCK = [
    AVERAGE,
    ARITHMETIC,
    TUNED,
    TIES,
    Row("TIES, a tuned sum", "ties", {"normalize": False, **_DENSE}, tuned=True),
    Row("DARE, tuned", "dare_linear", _DENSE, tuned=True),
    Row("DELLA, tuned", "della_linear", {"normalize": False, **_DENSE}, tuned=True),
    Row("SCE", "sce", {}),
    Row("Model Stock", "model_stock", {}),
    Row("Karcher mean", "karcher", {}),
    Row("multi-SLERP", "multislerp", {"weight": 1.0}),
    Row("RAM", "ram", {}),
]
# Coefficients of whole models that need not sum to 1, see curvature.py: task arithmetic is told
# their values.
CURVED = [
    Row(
        f"scalars, exponent {exponent}, curvature {kappa}",
        "task_arithmetic",
        {"exponent": exponent, "curvature": kappa},
    )
    for exponent in (2, 0)
    for kappa in (2.0, 10.0)
]
METAGPT = [
    Row(f"MetaGPT, {granularity}", "metagpt", {"granularity": granularity})
    for granularity in ("tensor", "layer", "model", "direction")
]
# The default is one of them: both for adapters, otherwise the input.
BY_SIDE = [
    Row(f"MetaGPT, direction, {name}", "metagpt", {"granularity": "direction", "side": side})
    for name, side in (("input side", "input"), ("both sides", "both"))
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
ROWS = [*STOCK, *CURVED, *METAGPT, *BY_SIDE]
QUICK_ROWS = [AVERAGE, ARITHMETIC, TUNED, TIES, *METAGPT]
