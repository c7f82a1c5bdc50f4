"""The weight files that a merge reads, and a check that they did not change meanwhile."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.kept_surveys import FileStats, file_stats, require_unchanged
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.fingerprints import fingerprint

_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


@dataclass(frozen=True)
class Inputs:
    """The models of a merge as they were before it began.

    Attributes:
        models: for each model its name, revision and files, as JSON types.
        stats: the state of each file, to see whether it has changed.
    """

    models: list[dict[str, Any]]
    stats: FileStats

    @classmethod
    def of(cls, config: MergeConfiguration, options: MergeOptions) -> "Inputs":
        """Open the models of a config, which applies their adapters, and look at their files."""
        LoaderCache().setup(options)
        models = canonical(config.referenced_models())
        paths = [path for model in models for path in _paths(model)]
        stats = file_stats(map(str, paths))
        return cls([_as_json(model) for model in models], stats)

    def require_unchanged(self) -> None:
        """Refuse a merge whose files changed while it ran.

        Raises:
            BadInputError: names the first of them.
        """
        require_unchanged(self.stats)


def _paths(model: ModelReference) -> list[Path]:
    index = LoaderCache().get(model).index
    return [Path(index.base_path, shard.filename) for shard in index.shards]


def _as_json(model: ModelReference) -> dict[str, Any]:
    snapshot = _SNAPSHOT.search(str(LoaderCache().get(model).index.base_path))
    adapter = sorted(Path(model.lora.path).glob("adapter_model.*")) if model.lora else []
    return {
        "model": str(model),
        "revision": model.model.revision or (snapshot and snapshot.group(1)),
        "files": _fingerprints(_paths(model)),  # with the adapter applied
        **({"adapter": _fingerprints(adapter)} if model.lora else {}),
    }


def _fingerprints(files: list[Path]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "bytes": f.stat().st_size, "fingerprint": fingerprint(f)} for f in files
    ]
