"""Files that are on the disk when a call returns, and so survive a power cut."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: Any) -> None:
    """Write JSON that is on the disk when this returns, and never half there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
