"""Weights that MergeKit does not know of, as far as a survey can tell.

``mergekit-metagpt check`` knows the plan of a merge, and refuses one that would lose weights.
Stock ``mergekit-yaml`` does not show its plan to a merge method, but a survey sees all tensors.
"""

import logging
from collections.abc import Collection, Iterable

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.names import COMPUTED, MASKS
from mergekit_metagpt.wording import counted

LOG = logging.getLogger(__name__)


def warn_of_unread(
    base: ModelReference, weights: Iterable[WeightInfo], held: Collection[str]
) -> None:
    """Log a warning that names weights of the base that the merge will drop.

    Args:
        base: the model.
        weights: what MergeKit's description of its architecture names.
        held: the names of all its tensors.
    """
    if names := _unread(base, weights, held):
        LOG.warning(
            "Model %s holds %s, which MergeKit does not know of and the merge will drop; stop it, "
            "and merge the weight files with mergekit-pytorch.",
            base,
            counted(names),
        )


def _unread(
    base: ModelReference, weights: Iterable[WeightInfo], held: Collection[str]
) -> list[str]:
    read: set[str] = set()
    for weight in weights:
        names = {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        if names.isdisjoint(held) and not weight.optional:
            return []  # MergeKit makes it from others, and a survey cannot tell which
        read |= names
    unread = [name for name in sorted(held) if name not in read]
    unread = [name for name in unread if not name.endswith((*COMPUTED, *MASKS))]
    if not unread:
        return []
    config = base.config(LoaderCache().trust_remote_code)
    architecture = next(iter(config.architectures or []), "")
    ties = tied_names(architecture) if getattr(config, "tie_word_embeddings", False) else []
    tied = {name for pair in ties for name in pair}
    return [name for name in unread if name not in tied and not is_ignored(architecture, name)]
