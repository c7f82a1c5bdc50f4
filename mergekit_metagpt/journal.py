"""What a merge does, noted tensor by tensor while it does it."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """The coefficients that one tensor was merged with.

    Attributes:
        tensor: its name.
        granularity: the scope of ``squared_norms``.
        experts: T model ids, in canonical order.
        squared_norms: ‖τ_t‖² over that scope, T floats.
        coefficients: λ_t, T floats.
    """

    tensor: str | None
    granularity: str
    experts: tuple[Hashable, ...]
    squared_norms: tuple[float, ...]
    coefficients: tuple[float, ...]


_open: list[list[Entry]] = []


@contextmanager
def keep() -> Iterator[list[Entry]]:
    """Collect an entry for each tensor that any thread of this process merges meanwhile."""
    entries: list[Entry] = []
    _open.append(entries)
    try:
        yield entries
    finally:
        _open[:] = [kept for kept in _open if kept is not entries]


def note(
    tensor: str | None,
    granularity: str,
    experts: Sequence[Hashable],
    squared_norms: Sequence[float],
    coefficients: Sequence[float],
) -> None:
    """Add an entry to every journal that is kept at the moment."""
    add([Entry(tensor, granularity, tuple(experts), tuple(squared_norms), tuple(coefficients))])


def add(noted: Sequence[Entry]) -> None:
    """Add entries, such as another process's, to every journal that is kept at the moment."""
    for entries in _open:
        entries.extend(noted)
