"""What identifies files and models. Nothing here samples: what is equal is the same file.

Inside a process, and for caches, a file is its path, inode, size, and times of modification and
change; a model that was downloaded is its repository and commit. What leaves the process has the
SHA-256.
"""

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit_metagpt.wording import BadInputError

# Inode, size in bytes, mtime, and ctime, which no program can set (on Windows, that of creation);
# times in ns. None if the file is gone.
Stat = tuple[int, int, int, int] | None

# A snapshot in the hub's cache: its repository and its commit. "--" is in no name.
_SNAPSHOT = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?")
# There, a large file is a link to one whose name is its SHA-256.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 22


def stat_of(path: str | Path) -> Stat:
    """Return what changes whenever a file does."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def changed_files(before: dict[str, Stat]) -> list[str]:
    """Return the sorted paths of files that are not what they were."""
    return sorted(path for path, stat in before.items() if stat != stat_of(path))


def require_unchanged(before: dict[str, Stat]) -> None:
    """Refuse a merge if one of its weight files has changed, with a BadInputError."""
    if changed := changed_files(before):
        raise BadInputError(
            f"Weight file {changed[0]} has changed since this merge began, which would mix two "
            "models; merge again when no program writes to it."
        )


def on_hub(directory: str) -> tuple[str, str] | None:
    """Return repository and commit of a model in the hub's cache; None for any other directory."""
    cached = re.search(f"{_SNAPSHOT.pattern}$", directory)
    return (cached[1].replace("--", "/"), cached[2]) if cached else None


def identity_of(path: str) -> list[Any]:
    """Return what a model's directory, or its only file, is; JSON types."""
    if cached := on_hub(path):
        return list(cached)
    if os.path.isfile(path):
        return [os.path.realpath(path), stat_of(path)]
    files = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    return [os.path.realpath(path), *([name, stat_of(os.path.join(path, name))] for name in files)]


def digest(*facts: Any) -> str:
    """Return the SHA-256 of facts of JSON types."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content; the same file is read only once by a process."""
    blob = os.path.basename(os.path.realpath(path))
    if _SNAPSHOT.search(os.path.abspath(path)) and _SHA256.fullmatch(blob):
        return blob
    return _sha256(os.path.realpath(path), stat_of(path))


@lru_cache(maxsize=4096)
def _sha256(path: str, _stat: Stat) -> str:
    content = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            content.update(block)
    return content.hexdigest()
