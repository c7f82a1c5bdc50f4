"""What MergeKit's own command loses without a word: the log says it first.

``mergekit-metagpt merge`` knows its plan, and refuses to lose weights. Stock ``mergekit-yaml``
shows its plan to no merge method, but a survey sees all tensors.
"""

import logging
from typing import TYPE_CHECKING

from mergekit_metagpt.measure.headers import is_computed
from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.wording import counted

if TYPE_CHECKING:
    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)


def warn_of_unread(checkpoints: "Checkpoints") -> None:
    """Log a warning that names weights of the base that the merge will drop."""
    if not checkpoints.are_files and (names := _unread(checkpoints)):
        LOG.warning(
            "Model %s holds %s, which MergeKit does not know of and the merge will drop; stop it, "
            "and merge the weight files with mergekit-pytorch.",
            checkpoints.base,
            counted(names),
        )


def _unread(checkpoints: "Checkpoints") -> list[str]:
    held = checkpoints.loader(checkpoints.base).index.tensor_paths
    read: set[str] = set()
    for weight in checkpoints.weights.values():
        names = {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        if names.isdisjoint(held) and not weight.optional:
            return []  # MergeKit makes it from others, and a survey cannot tell which
        read |= names
    unread = [name for name in sorted(held) if name not in read]
    headers = {name: checkpoints.header(checkpoints.base, name) for name in unread}
    unread = [name for name, header in headers.items() if header and not is_computed(name, header)]
    if not unread:
        return []
    config = checkpoints.config_of(checkpoints.base)
    architecture = next(iter(config.architectures or []), "")
    ties = tied_names(architecture) if getattr(config, "tie_word_embeddings", False) else []
    tied = {name for pair in ties for name in pair}
    return [name for name in unread if name not in tied and not is_ignored(architecture, name)]
