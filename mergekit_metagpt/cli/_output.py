"""What commands print, and the files that they write."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


def console() -> "Console":
    """Return rich's console for standard output; it prints model names unchanged."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def _written_whole(path: Path | str) -> Iterator[Path]:
    """Give a path to write to, which replaces ``path`` at the end, or is removed on failure.

    Raises:
        OSError: if the file cannot be written; names ``path``.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path  # a link, a device or a pipe stays what it is
        return
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str, text: str) -> None:
    """Write a file, which appears whole or not at all; ``-`` is standard output."""
    if path == "-":
        with click.open_file(path, "w", encoding="utf-8") as stdout:
            stdout.write(text)
        return
    with _written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, which appears whole or not at all; the suffix sets the format."""
    with _written_whole(path) as partial:
        figure.savefig(partial)


def replace_unprintable() -> None:
    """Print ``?`` for what standard output cannot encode, such as λ in ASCII."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
