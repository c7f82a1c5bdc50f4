"""The weight files that a merge reads, and a check that they did not change meanwhile."""

from dataclasses import dataclass
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.kept_surveys import FileStats, file_stats, require_unchanged
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.fingerprints import described, weight_files


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
        paths = [path for model in models for path in weight_files(model)]
        stats = file_stats(map(str, paths))
        return cls([described(model) for model in models], stats)

    def require_unchanged(self) -> None:
        """Refuse a merge whose files changed while it ran.

        Raises:
            BadInputError: names the first of them.
        """
        require_unchanged(self.stats)
