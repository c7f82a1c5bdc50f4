"""The wording of problems, shared by all commands."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


class BadInputError(ValueError):
    """Input that would make a merge fail; each argument is one sentence about it."""

    def __str__(self) -> str:
        return " ".join(self.args)


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that the user most likely meant, or None.

    >>> nearest("densitty", ["weight", "density"])
    'density'
    """
    by_lower = {choice.lower(): choice for choice in known}
    return next((by_lower[it] for it in get_close_matches(str(name).lower(), by_lower, n=1)), None)


def instead(name: Any, known: Iterable[str], otherwise: str = "") -> str:
    """Return advice on what to write instead of an unknown name.

    ``otherwise`` is the advice if no name is close, where they are too many to list.

    >>> instead("densitty", ["weight", "density"])
    'write density instead'
    >>> instead("colour", ["weight", "density"])
    'use one of density, weight'
    """
    known = sorted(known)
    close = nearest(name, known)
    if close:
        return f"write {close} instead"
    return otherwise or (f"use one of {', '.join(known)}" if known else "remove it")


def one_of(choices: Iterable[str]) -> str:
    """List the choices in words.

    >>> one_of(["tensor", "layer", "model"])
    'tensor, layer or model'
    """
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def counted(names: Sequence[str]) -> str:
    """Name the first of some tensors, and count the others.

    >>> counted(["lm_head.weight"])
    'tensor lm_head.weight'
    >>> counted(["a", "b", "c"])
    'tensor a and 2 more'
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


def reason(error: BaseException) -> str:
    """Return the first sentence of an exception's message.

    >>> reason(ValueError("no such model. Have a look at ..."))
    'no such model'
    >>> reason(KeyError("dtype"))
    "KeyError: 'dtype'"
    """
    said = " ".join(str(error).split()).split(". ")[0].rstrip(".: ")
    return said if " " in said else f"{type(error).__name__}: {said}".rstrip(": ")
