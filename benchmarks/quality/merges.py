"""The methods to compare, and the stock command that runs them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from benchmarks.quality.tasks import TASKS

GRANULARITIES = ("tensor", "layer", "model")
GRID = tuple(number / 10 for number in range(1, 11))

_DENSITY = {"density": 0.55}  # the paper's
# DARE's weights sum to 1, like MetaGPT's. For TIES any sum will do, since it divides by it.
_EQUAL = {"weight": 1 / len(TASKS)}

Method = tuple[str, Mapping[str, Any]]

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
        for granularity in GRANULARITIES
    },
    **{
        f"{name} + MetaGPT, {granularity}": (method, {"granularity": granularity, **_DENSITY})
        for name, method in (("TIES", "metagpt_ties"), ("DARE", "metagpt_dare_linear"))
        for granularity in GRANULARITIES
    },
}


def task_arithmetic(weight: float) -> Method:
    """Return task arithmetic with one scaling coefficient for all experts."""
    return "task_arithmetic", {"weight": weight}


def merge(method: Method, models: Path, out: Path, seed: int, device: str) -> None:
    """Run ``mergekit-yaml`` in this process, because its imports take longer than the merge.

    Args:
        method: the merge method and its parameters.
        models: an absolute directory with ``base`` and an expert per task.
        out: the directory to write; ``OUT.yml`` is written beside it.
        seed: the seed for DARE.
        device: a torch device.
    """
    name, parameters = method
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(models / task)} for task in TASKS],
        "parameters": dict(parameters),
        "dtype": "float32",
    }
    if name != "linear":  # which would average the base in
        config["base_model"] = str(models / "base")
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config), "utf-8")
    options = ["--quiet", "--random-seed", str(seed), "--device", device]
    mergekit_yaml([str(file), str(out), *options], standalone_mode=False)
