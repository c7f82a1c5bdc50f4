"""Names of tensors and of models: layers, the order of experts, short names for tables."""

import re
from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile
from typing import TypeVar

Id = TypeVar("Id", bound=Hashable)

_LAYER = re.compile(r"(?:^|\.)\d+(?=\.)")

# Buffers that older versions of transformers wrote, and newer ones compute.
COMPUTED = (".inv_freq", ".masked_bias", "position_ids", "num_batches_tracked")
# Masks of four dimensions, or biases of one.
MASKS = (".attn.bias", ".attention.bias")


def layer_of(tensor: str | None) -> str | None:
    """Return the layer that a tensor belongs to, or None if it is outside the layers.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight")
    'model.layers.3'
    >>> layer_of("model.embed_tokens.weight")
    """
    found = _LAYER.search(tensor or "")
    return found.string[: found.end()] if found else None


def number_of_layer(tensor: str) -> str | None:
    """Return the number of the layer that a tensor belongs to, without the layer's prefix.

    >>> number_of_layer("model.layers.3.mlp.experts.7.w1.weight")
    '3'
    """
    return (layer_of(tensor) or "").rpartition(".")[2] or None


def canonical(ids: Iterable[Id]) -> list[Id]:
    """Sort ids, so that their order does not depend on the order in the config."""
    return sorted(ids, key=lambda id_: (str(id_), type(id_).__name__))


def short_names(models: Iterable[object], longest: int | None = None) -> list[str]:
    """Return the last part of each name, or the whole names if two last parts are equal.

    Args:
        models: names or references.
        longest: shorten names with more characters than this. What all of them share is cut
            first, then the middle of each.

    >>> short_names(["TIGER-Lab/MAmmoTH-7B", "/models/chat"])
    ['MAmmoTH-7B', 'chat']
    >>> short_names(["C:\\\\models\\\\chat"])
    ['chat']
    >>> short_names(["a/llama-2-7b-instruct"], longest=12)
    ['llama-…truct']
    >>> short_names(["llama-2-7b-instruct-math-v2", "llama-2-7b-instruct-code-v2"], longest=12)
    ['…math-v2', '…code-v2']
    """
    names = [str(model) for model in models]
    short = [re.split(r"[/\\]", name.rstrip("/\\"))[-1] for name in names]
    names = short if _all_differ(short) else names
    if longest is not None and max(map(len, names), default=0) > longest:
        names = _without_shared(names, longest) if len(names) > 1 else names
        names = [_shortened(name, longest) for name in names]
    return names


def _without_shared(names: list[str], longest: int) -> list[str]:
    """Cut the words that all names start with, and, if that is not enough, end with."""
    words = [re.findall(r"[^-_./ ]+[-_./ ]*|[-_./ ]+", name) for name in names]
    start = _equal(words)
    words = [["…"] * bool(start) + row[start:] for row in words]
    if max(len("".join(row)) for row in words) > longest:
        end = _equal([row[::-1] for row in words])
        words = [row[: len(row) - end] + ["…"] * bool(end) for row in words]
    return ["".join(row) for row in words]


def _equal(rows: Sequence[Sequence[str]]) -> int:
    """Return how many words all rows start with; every row has more words than that."""
    columns = zip(*(row[:-1] for row in rows), strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def _all_differ(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def _shortened(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    head, tail = longest // 2, (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - tail :]}"
