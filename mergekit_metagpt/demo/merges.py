"""The merges of the demo: their configs, and the stock command that runs them."""

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.demo.models import TASKS


def merge_configs(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the merge configs by name, for the base and experts in ``directory``."""
    models = [{"model": str(directory / task)} for task in TASKS]
    on_base = {"base_model": str(directory / "base"), "models": models}

    def config(method: str, given: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        return {"merge_method": method, **given, "parameters": parameters}

    return {
        **{f"metagpt-{it}": config("metagpt", on_base, granularity=it) for it in GRANULARITIES},
        "task-arithmetic": config("task_arithmetic", on_base, weight=0.3),
        # linear divides by the sum of the weights.
        "average": config("linear", {"models": models}, weight=1.0),
    }


def write_configs(directory: Path) -> dict[str, Path]:
    """Write each of the merge configs into the directory; return the paths by name."""
    files = {}
    for name, config in merge_configs(directory).items():
        files[name] = directory / f"{name}.yml"
        files[name].write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return files


def stock_command() -> str:
    """Return the path of the ``mergekit-yaml`` that belongs to this interpreter.

    Raises:
        FileNotFoundError: if there is none.
    """
    scripts = sysconfig.get_path("scripts")
    if not (found := shutil.which("mergekit-yaml", path=scripts)):
        raise FileNotFoundError(
            f"There is no mergekit-yaml in {scripts}; install MergeKit for this interpreter."
        )
    return found


def merge_with_mergekit(command: str, config: Path, out: Path) -> None:
    """Run ``mergekit-yaml CONFIG OUT`` as a user would.

    Raises:
        RuntimeError: if it fails. The message has its stderr.
    """
    words = [command, str(config), str(out)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"mergekit-yaml could not merge {config}:\n{done.stderr}")
