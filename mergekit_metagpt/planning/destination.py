"""Where a merge is written: the output, and the place that it lies in until it is whole."""

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PARTIAL = re.compile(r"\.metagpt-partial-[0-9a-f]{16}")
_UNFINISHED, _REMOVED = ".unfinished", ".removed"


@dataclass(frozen=True)
class Partial:
    """A directory that a merge is written to until it is whole.

    Attributes:
        path: its place; the name is random, so that no two merges ever share one.
    """

    path: Path

    @property
    def mark(self) -> Path:
        """A file that is there as long as the directory may be removed without being asked."""
        return self.path.with_name(f"{self.path.name}{_UNFINISHED}")

    @property
    def removed(self) -> Path:
        """What the directory is called while it is removed."""
        return self.path.with_name(f"{self.path.name}{_REMOVED}")


@dataclass(frozen=True)
class Destination:
    """The output of a merge.

    A merge is written beside its output, which appears by being renamed. Onto a directory that
    exists nothing can be renamed if it is a mount point, and not every system says that it is
    one (a container's volume may be on the same disk). So all merges into a directory that
    exists are written in there, on the disk that they are meant for.

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
        """Yield what merges into this output have marked: the running one's, and dead ones'."""
        for mark in self.workplace.glob(f"*{_UNFINISHED}"):
            name = mark.name.removesuffix(_UNFINISHED)
            prefix, rest = name[: len(self.path.name)], name[len(self.path.name) :]
            if prefix == self.path.name and _PARTIAL.fullmatch(rest):
                yield Partial(self.workplace / name)

    def contents(self) -> set[Path]:
        """Return what the output holds, but for what belongs to unfinished merges into it."""
        if not self.path.is_dir():
            return set()
        own = {self.lock}
        for partial in self.unfinished():
            own |= {partial.path, partial.mark, partial.removed}
        return set(self.path.iterdir()) - own
