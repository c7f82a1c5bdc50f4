"""The weight files that a merge reads: what they were before it, and that they stayed so."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.measure.checkpoints import Checkpoints
from mergekit_metagpt.measure.identity import Stat, on_hub, sha256_of, stat_of
from mergekit_metagpt.measure.loaders import weight_files
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.job import Job


@dataclass(frozen=True)
class Inputs:
    """The models of a merge, in canonical order, as they were before it began."""

    files: dict[ModelReference, tuple[list[Path], list[Path]]]  # of the model, and of its adapter
    stats: dict[str, Stat]
    contents: dict[Path, "Future[str]"]  # SHA-256s, which a thread takes while the merge reads

    @property
    def identity(self) -> list[Any]:
        """What the models are now, as JSON types."""
        return [[str(it), *Checkpoints(it, ()).identity(it)] for it in self.files]

    def as_json(self) -> list[dict[str, Any]]:
        """Return each model's name, commit and files with their SHA-256, as JSON types."""
        return [
            {
                "model": str(model),
                "revision": cached[1]
                if (cached := on_hub(_directory(model)))
                else model.model.revision,
                "files": [self._file(path) for path in weights],  # with the adapter applied
                **({"adapter": [self._file(path) for path in adapter]} if model.lora else {}),
            }
            for model, (weights, adapter) in self.files.items()
        ]

    def _file(self, path: Path) -> dict[str, Any]:
        content = self.contents[path].result()
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": content}


def _directory(model: ModelReference) -> str:
    return str(LoaderCache().get(model).index.base_path)


@contextmanager
def opened(job: Job) -> Iterator[Inputs]:
    """Open the models of a job, which applies their adapters, and look at their files."""
    models = canonical(job.parsed.referenced_models())
    files = {
        model: (weight_files(LoaderCache().get(model)), _adapter_files(model)) for model in models
    }
    paths = [path for pair in files.values() for each in pair for path in each]
    reader = ThreadPoolExecutor(1)
    try:
        contents = {path: reader.submit(sha256_of, path) for path in dict.fromkeys(paths)}
        yield Inputs(files, {str(path): stat_of(path) for path in paths}, contents)
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _adapter_files(model: ModelReference) -> list[Path]:
    return sorted(Path(model.lora.path).glob("adapter_model.*")) if model.lora else []
