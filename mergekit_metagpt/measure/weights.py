"""The tensors of a checkpoint, as far as the headers of its weight files tell."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mergekit.io import ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

from mergekit_metagpt.measure.headers import Header
from mergekit_metagpt.measure.locations import Directory, Repository
from mergekit_metagpt.names import grouped, number_of_layer
from mergekit_metagpt.wording import BadInputError, counted, reason


@dataclass
class Weights:
    """All tensors of a checkpoint that MergeKit will find, and a sentence for each fault."""

    directory: str = ""  # empty for a repository on the hub
    tensors: dict[str, Header] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def by_layer(self) -> dict[str | None, dict[str, Header]]:
        """The headers of each layer; those of no layer under None."""
        layers = grouped((number_of_layer(name), (name, it)) for name, it in self.tensors.items())
        return {layer: dict(headers) for layer, headers in layers.items()}

    @property
    def index(self) -> ShardedTensorIndex:
        """The index that MergeKit would make of these files."""
        root = self.directory or os.curdir
        paths = {name: os.path.relpath(header.file, root) for name, header in self.tensors.items()}
        names = grouped((file, name) for name, file in paths.items())
        return ShardedTensorIndex(
            base_path=self.directory,
            is_safetensors=all(file.endswith(".safetensors") for file in names),
            tensor_paths=paths,
            shards=[ShardInfo(file, names[file]) for file in sorted(names)],
        )


def read_weights(place: Directory | Repository) -> Weights:
    """Read the headers of a model, from the files that MergeKit would choose."""
    weights = Weights(place.path)
    weights.problems.extend(_read(weights.tensors, place))
    return weights


def _read(tensors: dict[str, Header], place: Directory | Repository) -> Iterator[str]:
    """Read headers into ``tensors``, and yield what is wrong."""
    for file in place.kinds:
        index = f"{file}.index.json"
        if place.holds(index):
            if place.path and place.holds(file):
                yield (
                    f"Model {place.model} holds both {place.file(file)} and {index}, and MergeKit "
                    "reads only the latter's files; remove whichever is out of date."
                )
            yield from _read_shards(tensors, place, index)
            return
        if place.holds(file):
            try:
                tensors |= place.headers(file)
            except BadInputError as error:
                yield from error.args
            return
    yield (
        f"Model {place.model} has no weights (no {' or '.join(place.kinds)}, nor an index of "
        f"shards); {place.if_none}."
    )


def _read_shards(
    tensors: dict[str, Header], place: Directory | Repository, name: str
) -> Iterator[str]:
    """Read the headers of all files in an index, and check that the index matches them."""
    index = f"Index {place.file(name)} of model {place.model}"
    try:
        files = json.loads(place.text(name))["weight_map"].items()
        shards = grouped((Path(shard).as_posix(), tensor) for tensor, shard in files)
    except BadInputError as error:
        yield from error.args
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"{index} is corrupt ({reason(error)}); {place.if_broken}."
        return
    # On Windows, /a is not absolute, but has an anchor.
    outside = [path for path in map(Path, shards) if path.anchor or ".." in path.parts]
    if outside:
        yield (
            f"{index} names {outside[0].as_posix()}, a file outside of the model; download it "
            "again from someone you trust."
        )
        return
    for shard, names in sorted(shards.items()):
        named = set(names)
        try:
            held = place.headers(shard)
        except BadInputError as error:
            yield from error.args
            continue
        tensors |= {tensor: it for tensor, it in held.items() if tensor in named}
        file, stale = os.path.basename(shard), f"{index} is stale: "
        if lost := sorted(named - held.keys()):
            yield (
                f"{stale}it puts {counted(lost)} in {file}, which does not hold it; "
                f"{place.if_broken}."
            )
        if hidden := sorted(held.keys() - named):
            yield (
                f"{stale}{file} holds {counted(hidden)}, which the index does not name and "
                f"MergeKit would not find; {place.if_broken}."
            )
