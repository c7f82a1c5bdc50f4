"""Files and directories that are either complete or missing, so that a run can continue."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give an empty directory to write into, which gets its name when the block succeeds."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)


def write_json(path: Path, figures: object) -> None:
    """Write figures into a file that is complete as soon as it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(partial, path)
