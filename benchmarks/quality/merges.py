"""The methods to compare."""

from benchmarks.quality.tasks import TASKS
from benchmarks.stock_merge import Method

GRANULARITIES = ("tensor", "layer", "model")
PLAIN = (*GRANULARITIES, "direction")  # those of the plain method
GRID = tuple(number / 10 for number in range(1, 11))

_DENSITY = {"density": 0.55}  # the paper's
# DARE's weights sum to 1, like MetaGPT's. For TIES any sum will do, since it divides by it.
_EQUAL = {"weight": 1 / len(TASKS)}

# The merge method and its parameters, by the name of a table's row. All other parameters have
# MergeKit's defaults.
BASELINES: dict[str, Method] = {
    "weight average": ("linear", {"weight": 1.0}),
    "task arithmetic, 0.3": ("task_arithmetic", {"weight": 0.3}),
    "TIES": ("ties", {**_EQUAL, **_DENSITY}),
    "DARE": ("dare_linear", {**_EQUAL, **_DENSITY}),
    "SCE": ("sce", {}),
    "Model Stock": ("model_stock", {}),
}
METAGPT: dict[str, Method] = {
    "exponent 0, model": ("metagpt", {"exponent": 0, "granularity": "model"}),
    **{
        f"exponent 1, {granularity}": ("metagpt", {"exponent": 1, "granularity": granularity})
        for granularity in GRANULARITIES
    },
    **{
        f"MetaGPT, {granularity}": ("metagpt", {"granularity": granularity})
        for granularity in PLAIN
    },
    **{
        f"{name} + MetaGPT, {granularity}": (method, {"granularity": granularity, **_DENSITY})
        for name, method in (("TIES", "metagpt_ties"), ("DARE", "metagpt_dare_linear"))
        for granularity in GRANULARITIES
    },
}
