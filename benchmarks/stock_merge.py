"""Merge with MergeKit's own command, in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

Method = tuple[str, Mapping[str, Any]]


def task_arithmetic(weight: float) -> Method:
    """Return task arithmetic with one scaling coefficient for all experts."""
    return "task_arithmetic", {"weight": weight}


def merge(
    method: Method,
    base: Path,
    experts: Sequence[object],
    out: Path,
    seed: int,
    device: str,
    *options: str,
) -> None:
    """Run ``mergekit-yaml`` in this process, because its imports take longer than the merge.

    Args:
        method: the merge method and its parameters. A tuple of weights has one for each expert.
        base: the absolute directory of the base.
        experts: the experts, as MergeKit writes them.
        out: the directory to write; ``OUT.yml`` is written beside it.
        seed: the seed for methods that draw at random.
        device: a torch device.
        options: more options of ``mergekit-yaml``.
    """
    name, parameters = method[0], dict(method[1])
    weights = parameters.pop("weight") if isinstance(parameters.get("weight"), tuple) else ()
    own = [{"parameters": {"weight": weight}} for weight in weights] or [{} for _ in experts]
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(expert), **its} for expert, its in zip(experts, own, strict=True)],
        "parameters": parameters,
        "dtype": "float32",
    }
    if name not in {"linear", "karcher"}:  # which would average the base in
        config["base_model"] = str(base)
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config), "utf-8")
    words = ["--quiet", "--random-seed", str(seed), "--device", device, *options]
    mergekit_yaml([str(file), str(out), *words], standalone_mode=False)
