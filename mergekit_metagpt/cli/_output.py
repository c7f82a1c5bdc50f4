"""The standard output of commands."""

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """Return rich's console for standard output; it prints model names unchanged."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def replace_unprintable() -> None:
    """Print ``?`` for what standard output cannot encode, such as λ in ASCII."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
