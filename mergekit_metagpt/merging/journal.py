"""The journal of a merge: what it merges, and which files of its output are complete.

It is written to the mark of the partial directory. A merge that has stopped, for whatever reason,
can go on from it.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from pydantic import TypeAdapter

from mergekit_metagpt.merging.shard import Written
from mergekit_metagpt.planning.destination import Destination, Partial
from mergekit_metagpt.planning.fingerprints import fingerprint
from mergekit_metagpt.wording import BadInputError

# What a merge depends on: a value of JSON types by its name, as messages call it.
Facts = dict[str, Any]

_FACTS, _SHARD = "merge", "shard "  # what notes are called; the file of the shard follows
_WRITTEN = TypeAdapter(Written)
_SHOWN = ("the seed", "the list of options", "the version of", "the number of")


class ChangedError(BadInputError):
    """What an unfinished merge depends on has changed, so it cannot go on; it is kept."""


def resumable(destination: Destination) -> Partial | None:
    """Return the unfinished merge into an output that can go on, if there is one."""
    found = [p for p in destination.unfinished() if p.path.is_dir() and _FACTS in p.notes]
    return max(found, key=lambda partial: partial.mark.stat().st_mtime, default=None)


def resumed_seed(out: Path) -> int | None:
    """Return the seed of the unfinished merge into an output; None if none can go on."""
    partial = resumable(Destination.of(out))
    seed: int | None = partial.notes[_FACTS]["the seed"] if partial else None
    return seed


class Journal:
    """What has become of a merge so far.

    Attributes:
        partial: where the merge is written.
        complete: the numbers of the shards that are complete.
        facts: what the bytes of the merge depend on.
    """

    def __init__(self, partial: Partial) -> None:
        self.partial = partial
        self.complete: set[int] = set()
        self.facts: Facts = {}

    def begin(self, facts: Facts, models: Iterable[ModelReference]) -> dict[int, Written]:
        """Begin a merge, or go on with it.

        Args:
            facts: what else its bytes depend on.
            models: those of the config.

        Returns:
            The shards that are complete, by number. They have the names that they were written
            under, and nothing else is left in the directory.

        Raises:
            ChangedError: if the merge cannot go on, since a fact has changed.
        """
        facts = json.loads(json.dumps({**self.facts, **facts}))
        before = self.partial.notes.get(_FACTS)
        if before is None:
            self.partial.note(_FACTS, facts)
            return {}
        for name in (*before, *facts):
            old, new = before.get(name), facts.get(name)
            if old != new:
                values = f" from {old} to {new}" if name.startswith(_SHOWN) else ""
                raise ChangedError(
                    f"The unfinished merge in {self.partial.path} cannot go on, because {name} "
                    f"has changed{values}; undo that, or merge without --resume to begin anew."
                )
        known = self._claim({str(model): model for model in models})
        self.complete |= known.keys()
        return known

    def _claim(self, models: dict[str, ModelReference]) -> dict[int, Written]:
        shards = [n for name, n in self.partial.notes.items() if name.startswith(_SHARD)]
        notes = {note["fingerprint"]: note for note in shards}
        found: list[tuple[Path, Written]] = []
        for path in list(self.partial.path.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif note := notes.get(fingerprint(path)):
                found.append((path, _written(note, models)))
            else:
                path.unlink()
        for path, written in found:  # they may have their final names already
            os.rename(path, self.partial.path / written.file)
        return {written.number: written for _, written in found}

    def note(self, written: Written) -> None:
        """Note that a shard is complete, once it is on the disk."""
        path = self.partial.path / written.file
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        named = [replace(e, experts=tuple(map(str, e.experts))) for e in written.entries]
        note = asdict(replace(written, entries=named))
        self.partial.note(f"{_SHARD}{written.number}", {**note, "fingerprint": fingerprint(path)})
        self.complete.add(written.number)


def _written(note: dict[str, Any], models: dict[str, ModelReference]) -> Written:
    """Return what a task had done, from its note."""
    written = _WRITTEN.validate_python(note)
    entries = [
        replace(entry, experts=tuple(models[str(name)] for name in entry.experts))
        for entry in written.entries
    ]
    return replace(written, entries=entries)
