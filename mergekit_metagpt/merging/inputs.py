"""The weight files that a merge reads: what they were before it, and that they stayed so."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.measure.identity import (
    Stat,
    changed_files,
    identity_of,
    on_hub,
    require_unchanged,
    sha256_of,
    stat_of,
)
from mergekit_metagpt.measure.loaders import weight_files
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.job import Job


@dataclass(frozen=True)
class Inputs:
    """The models of a merge as they were before it began.

    Attributes:
        models: the models, in canonical order.
        files: the weight files of each model and of its adapter.
        stats: the state of each file, to see whether it has changed.
        contents: the SHA-256 of each file, which a thread takes while the merge reads it.
    """

    models: list[ModelReference]
    files: dict[ModelReference, tuple[list[Path], list[Path]]]
    stats: dict[str, Stat]
    contents: dict[Path, "Future[str]"]

    @property
    def identity(self) -> list[Any]:
        """What the models are now, as JSON types."""
        directories = {m: str(LoaderCache().get(m).index.base_path) for m in self.models}
        return [
            *([str(model), *identity_of(path)] for model, path in directories.items()),
            self.stats,  # an index may name files in folders below
        ]

    def require_unchanged(self) -> None:
        """Refuse a merge whose files changed while it ran.

        Raises:
            BadInputError: names the first of them.
        """
        require_unchanged(self.stats)

    def are_unchanged(self) -> bool:
        """Return whether no file has changed since the merge began."""
        return not changed_files(self.stats)

    def as_json(self) -> list[dict[str, Any]]:
        """Return each model's name, commit and files with their SHA-256, as JSON types."""
        return [self._described(model) for model in self.models]

    def _described(self, model: ModelReference) -> dict[str, Any]:
        weights, adapter = self.files[model]
        cached = on_hub(str(LoaderCache().get(model).index.base_path))
        return {
            "model": str(model),
            "revision": cached[1] if cached else model.model.revision,
            "files": [self._file(path) for path in weights],  # with the adapter applied
            **({"adapter": [self._file(path) for path in adapter]} if model.lora else {}),
        }

    def _file(self, path: Path) -> dict[str, Any]:
        content = self.contents[path].result()
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": content}


@contextmanager
def opened(job: Job) -> Iterator[Inputs]:
    """Open the models of a job, which applies their adapters, and look at their files."""
    models = canonical(job.parsed.referenced_models())
    files = {model: (weight_files(model), _adapter_files(model)) for model in models}
    paths = [path for pair in files.values() for each in pair for path in each]
    reader = ThreadPoolExecutor(1)
    try:
        contents = {path: reader.submit(sha256_of, path) for path in dict.fromkeys(paths)}
        yield Inputs(models, files, {str(path): stat_of(path) for path in paths}, contents)
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _adapter_files(model: ModelReference) -> list[Path]:
    return sorted(Path(model.lora.path).glob("adapter_model.*")) if model.lora else []
