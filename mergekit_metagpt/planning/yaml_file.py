"""Reads the YAML of merge configs, and turns Python objects into what YAML can hold."""

import re
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

import click
import numpy as np
import torch
import yaml
from mergekit.common import ModelPath, ModelReference
from pydantic import BaseModel

from mergekit_metagpt.wording import BadInputError, reason

# Far above any real config: its characters, and the values that its aliases repeat.
_LONGEST_TEXT, _MOST_REPEATED = 1 << 27, 1_000_000

_TWICE = "is there twice; first"
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(file: str) -> tuple[str, Any]:
    """Return the text of a file, and what it holds; ``-`` is standard input.

    Raises:
        BadInputError: if it cannot be read, is too large, or is not one YAML document in which
            every key is set once.
    """
    try:
        with click.open_file(file, "rb") as stream:
            content = stream.read(_LONGEST_TEXT)
        if len(content) == _LONGEST_TEXT:
            raise OSError("it does not end")
    except FileNotFoundError:
        raise BadInputError(f"Merge config {file} does not exist; correct its path.") from None
    except OSError as error:
        raise BadInputError(
            f"Merge config {file} cannot be read ({reason(error)}); name a YAML file."
        ) from None
    text = _decoded(content, file)
    try:
        return text, yaml.load(text, _StrictLoader)
    except _StrictLoader.TooLargeError:
        raise BadInputError(
            f"Merge config {file} repeats values by aliases more than {_MOST_REPEATED:,} times; "
            "write it with fewer aliases."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInputError(
            f"Merge config {file} has the character U+{error.character:04X} in line {line}, "
            "which YAML does not allow; remove it."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise BadInputError(f"Merge config {file} {_complaint(error, text)}.") from None
    except RecursionError:
        raise BadInputError(
            f"Merge config {file} holds lists in lists without an end; remove the alias that "
            "repeats what it is part of."
        ) from None


def _decoded(content: bytes, file: str) -> str:
    try:
        return re.sub("\r\n?", "\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = content.count(b"\n", 0, error.start) + 1
        what = "UTF-16" if wide else f"byte 0x{content[error.start]:02x} in line {line} shows"
        raise BadInputError(
            f"Merge config {file} is not in UTF-8, {'but in ' * wide}{what}"
            f"{' from line 1 on' if wide else ''}; save it as UTF-8."
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is set twice, and aliases that expand to more than fits into memory."""

    class TooLargeError(Exception):
        """There are too many values."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                first = known.setdefault((key.tag, key.value), key)
                if first is not key:
                    said = f"{key.value} {_TWICE}"
                    raise yaml.MarkedYAMLError(said, first.start_mark, "", key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of a date or a number
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None

    def construct_document(self, node: yaml.Node) -> Any:
        # Without aliases, a text holds at most as many values as characters.
        if _values(node, {}) > _MOST_REPEATED + self.index:
            raise self.TooLargeError
        return super().construct_document(node)


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Count a node and the values below it; an alias counts each time that it is used."""
    if node not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[node] = 1 + sum(_values(child, known) for child in children)
    return known[node]


# A part of what PyYAML says, or what is to be seen in the line, and what to say of it.
_COMPLAINTS = {
    _TWICE: "sets {name} twice, in lines {first} and {line}, and MergeKit would forget the first; "
    "remove one of them",
    "undefined alias": "uses the alias *{name} in line {line}, but has no anchor &{name} before "
    "it; add the anchor, or put the text in quotes",
    "duplicate anchor": "defines the anchor &{name} twice, in lines {first} and {line}; give one "
    "of them another name",
    "several documents": "holds several merges, the second from line {line} on; split it, or run "
    "it with mergekit-multi",
    "single document": "begins a second merge with --- in line {line}, which is empty; remove "
    "that line",
    "tab in front": "has a tab in line {line}, where YAML allows only spaces; indent with spaces",
    "scanning an alias": "has a bare * in {where}, which YAML takes for an alias; write "
    '"*" in quotes',
    "unknown escape character": "has a backslash in double quotes in {where}; write that text in "
    "single quotes",
    "fence of a card": "holds the ``` of a model card in line {line}; remove it",
    "cannot start any token": "has a bare {name} in {where}, with which no text begins; put the "
    "text in quotes",
    "unhashable key": "has a mapping or a list as a key in {where}, perhaps a placeholder in "
    "{{{{ }}}}; write a name there, or put the text in quotes",
    "mapping values are not allowed": "has a colon in {where}, where no value can follow; put the "
    "text in quotes, or correct the indentation",
    "expected <block end>, but found '<block": "is indented otherwise in {where} than the lines "
    "around it; align it with them",
    "": "is not YAML in {where} ({problem}); correct it",
}


def _complaint(error: yaml.MarkedYAMLError, text: str) -> str:
    """Say what is wrong, where, and the way out; PyYAML's own words where they are clear."""
    context, problem = error.context or "", error.problem or ""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.split("\n")
    written = lines[line - 1] if line <= len(lines) else ""
    signs = [context, problem]
    if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in problem:
        signs.append("tab in front")
    if written.lstrip().startswith("```"):
        signs.append("fence of a card")
    if any(it.strip() and not it.lstrip().startswith("#") for it in lines[line:]):
        signs += ["several documents"] * ("single document" in context)
    known = next(known for known in _COMPLAINTS if any(known in sign for sign in signs))
    quoted = f"{context} {problem}".split("'")
    return _COMPLAINTS[known].format(
        name=context.removesuffix(f" {_TWICE}") if known == _TWICE else "".join(quoted[1:2]),
        first=error.context_mark.line + 1 if error.context_mark else line,
        line=line,
        where=f"line {line}, column {mark.column + 1 if mark else 1}",
        problem=problem or context,
    )


def plain(value: Any) -> Any:
    """Return a config, or a part of one, as types that YAML holds, without MergeKit's defaults.

    MergeKit's own serializer fails for a model path that contains a space. If the path contains
    a + or @, the text that it writes is read back as a different model.

    Raises:
        BadInputError: if it holds something that no config can.

    >>> plain({"weight": np.float32(0.5), "layer_range": (0, 2), "dtype": torch.bfloat16})
    {'weight': 0.5, 'layer_range': [0, 2], 'dtype': 'bfloat16'}
    """
    if isinstance(value, ModelReference) and _reads_back(value):
        return str(value)
    if isinstance(value, BaseModel):
        changed = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if getattr(value, name) != field.default
        }
        return plain(changed)
    if isinstance(value, Mapping):
        return {
            plain(key): fspath(member)
            if key == "path" and isinstance(member, PathLike)
            else plain(member)
            for key, member in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return plain(value.tolist())  # of numpy and torch, the only way to Python's own numbers
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, PathLike):
        return plain(ModelReference(model=ModelPath(path=fspath(value))))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # subclasses of these, too
        if isinstance(value, kind):
            return kind(value)
    raise BadInputError(
        f"The config holds {value!r} of type {type(value).__name__}, which no merge config can; "
        "write it as text, a number, a list or a mapping."
    )


def _reads_back(model: ModelReference) -> bool:
    try:
        return bool(ModelReference.model_validate(str(model)) == model)
    except RuntimeError:  # more than one + or @
        return False
