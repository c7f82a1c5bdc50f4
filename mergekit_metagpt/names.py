"""Names of tensors and of models: layers, the order of experts, short names for tables."""

import re
from collections.abc import Hashable, Iterable
from os.path import commonprefix
from typing import TypeVar

Id = TypeVar("Id", bound=Hashable)
Value = TypeVar("Value")

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


def grouped(pairs: Iterable[tuple[Id, Value]]) -> dict[Id, list[Value]]:
    """Return the values of each key, both in the order in which they come.

    >>> grouped([("a", 1), ("b", 2), ("a", 3)])
    {'a': [1, 3], 'b': [2]}
    """
    groups: dict[Id, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def short_names(models: Iterable[object], longest: int | None = None) -> list[str]:
    """Return the last part of each name, or the whole names if two last parts are equal.

    Args:
        models: names or references.
        longest: shorten names with more characters than this. The words that all of them start
            with are cut first, then the middle of each.

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
    names = short if len(set(short)) == len(short) else names
    if longest is None:
        return names
    if len(names) > 1 and max(map(len, names)) > longest:
        shared = re.match(r"(.*[-_./ ])?", commonprefix(names))  # noqa: RUF071  # of words
        names = ["…" + name[shared.end() :] if shared and shared[0] else name for name in names]
    head, tail = longest // 2, (longest - 1) // 2
    return [n if len(n) <= longest else f"{n[:head]}…{n[len(n) - tail :]}" for n in names]
