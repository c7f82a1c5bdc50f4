"""Where a merge is written: its output, and the directory that holds it until it is complete."""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PARTIAL = re.compile(r"\.metagpt-partial-[0-9a-f]{16}")
_UNFINISHED, _REMOVED = ".unfinished", ".removed"


@dataclass(frozen=True)
class Partial:
    """A directory that a merge is written to until it is complete.

    Attributes:
        path: its place; the name is random, so that no two merges ever share one.
    """

    path: Path

    @property
    def mark(self) -> Path:
        """A file that exists as long as a later merge may remove the directory.

        Its first line is the host; a line of JSON follows for each note.
        """
        return self.path.with_name(f"{self.path.name}{_UNFINISHED}")

    @property
    def removed(self) -> Path:
        """The path of the directory while it is being removed."""
        return self.path.with_name(f"{self.path.name}{_REMOVED}")

    @property
    def host(self) -> str:
        """The host that the merge runs on."""
        return self._lines[0]

    @property
    def notes(self) -> dict[str, Any]:
        """What has been noted about the merge, by name."""
        notes: dict[str, Any] = {}
        for line in self._lines[1:]:
            with suppress(ValueError):  # of the last one, if the merge was killed meanwhile
                notes |= json.loads(line)
        return notes

    def note(self, name: str, value: Any) -> None:
        """Note something of JSON types, which is on the disk when this returns."""
        with self.mark.open("a", encoding="utf-8") as mark:
            # Before, not after the line: an earlier one may have been cut off.
            mark.write("\n" + json.dumps({name: value}))
            mark.flush()
            os.fsync(mark.fileno())

    @property
    def moved(self) -> list[str]:
        """The files that may be in the output already, moved there by a merge that was killed."""
        return list(self.notes.get("moved", []))

    @property
    def _lines(self) -> list[str]:
        try:
            return self.mark.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:  # the merge has just ended
            return [""]


@dataclass(frozen=True)
class Destination:
    """The output of a merge.

    A merge is written beside its output, and renamed to it at the end. But nothing can be
    renamed to an existing directory that is a mount point, and not every system says that it is
    one (a container's volume may be on the same disk). So a merge into an existing directory is
    always written inside it, which also uses the right disk.

    Attributes:
        path: the output, with links followed.
        workplace: the directory that the merge is written in: the output if it exists, or else
            its parent.
    """

    path: Path
    workplace: Path

    @classmethod
    def of(cls, out: Path | str) -> "Destination":
        """Look at an output as it is now."""
        path = Path(out).resolve()
        return cls(path, path if path.is_dir() else path.parent)

    @property
    def exists(self) -> bool:
        """Whether the output was there before the merge."""
        return self.workplace == self.path

    @property
    def lock(self) -> Path:
        """The file that a running merge locks."""
        return self.workplace / f"{self.path.name}.metagpt-lock"

    def new_partial(self) -> Partial:
        """Choose a place for a merge."""
        token = secrets.token_hex(8)
        return Partial(self.workplace / f"{self.path.name}.metagpt-partial-{token}")

    def unfinished(self) -> Iterator[Partial]:
        """Yield the directories of unfinished merges into this output, running or dead."""
        for mark in self.workplace.glob(f"*{_UNFINISHED}"):
            name = mark.name.removesuffix(_UNFINISHED)
            prefix, rest = name[: len(self.path.name)], name[len(self.path.name) :]
            if prefix == self.path.name and _PARTIAL.fullmatch(rest):
                yield Partial(self.workplace / name)

    def contents(self) -> set[Path]:
        """Return what the output holds, except for files of unfinished merges into it."""
        if not self.path.is_dir():
            return set()
        own = {self.lock}
        for partial in self.unfinished():
            own |= {partial.path, partial.mark, partial.removed}
            own |= {self.path / name for name in partial.moved}
        return set(self.path.iterdir()) - own
