"""What to write where a config has a value of another form than MergeKit wants."""

from typing import Any

from pydantic import ValidationError

Place = tuple[int | str, ...]

_MODEL = "a path or the name of a model on the hub, or for any path {model: {path: PATH}}"
_RANGE = "the first layer and the one after the last, such as layer_range: [0, 4]"

# By key; "[]" stands for an entry of its list or mapping.
_FORMS = {
    "models": "a list, with - model: PATH for each model",
    "slices": "a list, with - sources: [...] for each slice",
    "slices[]": "sources: and a list",
    "sources": "a list, with - {model: PATH, layer_range: [0, 4]} for each model",
    "sources[]": "{model: PATH, layer_range: [0, 4]}",
    "modules[]": "models: or slices:, and a list",
    "tokens[]": "source: and a model, such as {source: PATH}",
    "modules": "the name of each module, and under it its models: or slices:",
    "parameters": "names and values, such as parameters: {weight: 0.5}",
    "layer_range": _RANGE,
    "layer_range[]": _RANGE,
    "filter": "a part of the tensors' names as text; for several, write one entry for each",
    "value": "a number, text or true, or a list of these for a gradient over the layers",
    "tokens": "each token, and under it its source:",
    "pad_to_multiple_of": "a whole number",
    "merge_method": "a name such as metagpt",
    "dtype": "a name such as bfloat16",
    "out_dtype": "a name such as bfloat16",
    "chat_template": "auto, a name such as chatml, or a template in quotes",
    **dict.fromkeys(("model", "base_model", "tokenizer_source", "lora"), _MODEL),
}
_SETTING = "a number, a list of numbers, or entries such as - {filter: mlp, value: 0.5}"


def complaints(error: ValidationError, raw: Any, file: str) -> list[str]:
    """Return a sentence for each value of a raw config that pydantic refuses."""
    found: dict[Place, str] = {}
    for each in error.errors():
        place, value = _existing(raw, each["loc"])
        if each["type"] == "missing" and isinstance(value, dict) and "path" not in value:
            sentence = f"{file} lacks {_written((*place, each['loc'][-1]))}; add it."
        else:
            sentence = f"{file} has {_shown(value)} at {_written(place)}; {_way(place, value)}."
        found.setdefault(place, sentence)  # of the complaints about a union, only the first
    # What is wrong inside a value says more than that the value is wrong.
    inner = [place for place in found if not any(_is_within(other, place) for other in found)]
    return [found[place] for place in inner]


def _existing(value: Any, path: Place) -> tuple[Place, Any]:
    """Return what of a pydantic location the config has, without names of types, and its value."""
    place: list[int | str] = []
    for key in path:
        known = range(len(value)) if isinstance(value, list) else value
        if isinstance(known, dict | range) and key in known:
            place.append(key)
            value = value[key]
    return tuple(place), value


def _is_within(inner: Place, outer: Place) -> bool:
    """Whether a place is inside another one, or deeper in the same parameter."""
    shared = outer
    if "parameters" in outer:  # of the forms that a parameter may have, the nearest is meant
        shared = outer[: outer.index("parameters") + 2]
    return len(inner) > len(outer) and inner[: len(shared)] == shared


def _written(place: Place) -> str:
    keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return "".join(keys).lstrip(".") or "its top"


def _shown(value: Any) -> str:
    """Describe a value.

    >>> _shown("union"), _shown(["mlp"]), _shown({"a": 1}), _shown(None)
    ("the text 'union'", 'a list', 'a mapping', 'nothing')
    """
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{'the text ' * isinstance(value, str)}{shown if len(shown) < 60 else shown[:57] + '…'}"


def _way(place: Place, value: Any) -> str:
    """Return what to write, with the value in its place if that is all that is missing."""
    keys = [key for key in place if isinstance(key, str)]
    key = keys[-1] if keys else ""
    entry = f"{key}[]" if place and isinstance(place[-1], int) else key
    if len(keys) > 1 and keys[-2] in ("modules", "tokens"):
        entry = f"{keys[-2]}[]"
    is_text = isinstance(value, str)
    if entry == "models[]":
        return f"write - model: {value if is_text else 'PATH'}"
    if key in ("tokenizer", "source") and "tokens" not in keys:
        return f"write tokenizer: {{source: {value if is_text else 'union'}}}"
    if isinstance(value, dict) and "path" in value and _FORMS.get(key) == _MODEL:
        return f"write {key}: {{model: {{path: {value['path']}}}}}"
    if "parameters" in place[:-1] and key not in ("filter", "value"):
        return f"write {_SETTING}" + ", or remove it" * (value is None)
    return f"write {_FORMS.get(entry, 'text')}"
