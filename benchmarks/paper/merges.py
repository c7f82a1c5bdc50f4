"""The checkpoint of a row: a model on the hub or in a folder, or a merge by mergekit-yaml."""

import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import click
import yaml

from benchmarks.paper.tables import Row


def with_local_models(row: Row, folder: Path) -> Row:
    """Return a row whose models are checkpoints in a folder.

    Args:
        row: a row with names on the hub, such as ``org/name``.
        folder: an absolute path with a subfolder ``org/name`` or ``name`` for each model.

    Raises:
        ClickException: if the folder lacks a model, or if MergeKit would misread its path.
    """
    if isinstance(row.source, str):
        return replace(row, source=_local_path(row.source, folder))
    config = dict(row.source)
    config["base_model"] = _local_path(config["base_model"], folder)
    config["models"] = [{"model": _local_path(it["model"], folder)} for it in config["models"]]
    return replace(row, source=config)


def _local_path(name: str, folder: Path) -> str:
    if set("+@") & set(str(folder)):
        raise click.ClickException(
            f"MergeKit reads the + or @ in {folder} as a LoRA or a revision; move the models."
        )
    short = name.rpartition("/")[2]
    for path in (folder / name, folder / short):
        if (path / "config.json").is_file():
            return str(path)
    raise click.ClickException(
        f"{folder} has no checkpoint of {name}; put it there as {name} or {short}."
    )


def merge(row: Row, path: Path) -> None:
    """Merge a row with ``mergekit-yaml``, unless ``path`` already has this merge.

    The merge is written to a temporary folder beside ``path``, and renamed when it is complete.
    MergeKit stores the config in the merge, which shows whether an existing merge is the right
    one.

    Raises:
        ClickException: if ``mergekit-yaml`` fails. Its output is printed above the message.
    """
    config = yaml.safe_dump(row.source, sort_keys=False)
    if path.exists():
        if (path / "mergekit_config.yml").read_text("utf-8") == config:
            return
        shutil.rmtree(path)
    partial = path.with_name("merged-partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name("merge.yml")
    file.write_text(config, "utf-8")
    options = ["--random-seed", "0", "--device", "auto"]
    command = Path(sysconfig.get_path("scripts"), "mergekit-yaml")
    status = subprocess.run([command, str(file), str(partial), *options]).returncode
    if status:
        shutil.rmtree(partial, ignore_errors=True)
        raise click.ClickException(
            f"mergekit-yaml could not merge {file} (exit status {status}); see its output above."
        )
    partial.rename(path)
