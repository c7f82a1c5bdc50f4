"""What MergeKit's own command loses or writes wrongly without a word: the log says it first.

``mergekit-metagpt merge`` knows its plan, refuses to lose weights, and corrects what it has
written. Stock ``mergekit-yaml`` shows its plan to no merge method, but much is known when it
plans, and a survey sees all tensors.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import yaml

from mergekit_metagpt.mergekit_private import is_ignored, tied_names
from mergekit_metagpt.names import COMPUTED, MASKS
from mergekit_metagpt.wording import counted

if TYPE_CHECKING:
    from mergekit.io import LazyTensorLoader

    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)

_WAY = "correct that when the merge is done, or use mergekit-metagpt merge, which does it"


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
    unread = [name for name in unread if not name.endswith((*COMPUTED, *MASKS))]
    if not unread:
        return []
    config = checkpoints.config_of(checkpoints.base)
    architecture = next(iter(config.architectures or []), "")
    ties = tied_names(architecture) if getattr(config, "tie_word_embeddings", False) else []
    tied = {name for pair in ties for name in pair}
    return [name for name in unread if name not in tied and not is_ignored(architecture, name)]


def warn_of_untold(checkpoints: "Checkpoints") -> None:
    """Log a warning for each thing in which the output of ``mergekit-yaml`` will be wrong.

    Under any other command, and for the second slice of a config, do nothing.
    """
    command = click.get_current_context(silent=True)
    if command is None or command.command.name != "mergekit-yaml":
        return
    file = Path(command.params["config_file"])
    if file.is_file() and command.meta.setdefault(__name__, checkpoints) is checkpoints:
        config = yaml.safe_load(file.read_text("utf-8"))  # a pipe could be read only once
        for sentence in _untold(checkpoints, config):
            LOG.warning("%s", sentence)


def _untold(checkpoints: "Checkpoints", config: Mapping[str, Any]) -> Iterator[str]:
    base, said = checkpoints.base, checkpoints.config_of(checkpoints.base)
    if getattr(said, "tie_word_embeddings", False):
        ties = tied_names((said.architectures or [""])[0])
        ties = [(head, table) for head, table in ties if "embed" not in head]
        for model in checkpoints.models:
            if head := own_head(checkpoints.loader(model), ties):
                yield (
                    f"Model {model} has a head of its own ({head}), but the config.json of the "
                    f"merge will say tie_word_embeddings: true, as that of {base} does; {_WAY}."
                )
                break
    dtypes: list[Any] = [checkpoints.config_of(model).dtype for model in checkpoints.models]
    if not (config.get("out_dtype") or config.get("dtype")) and None not in dtypes:
        stored = reduce(torch.promote_types, dtypes)
        if stored != said.dtype:
            yield (
                f"The merge will be stored in {stored}, but its config.json will say {said.dtype}, "
                f"as that of {base} does; set dtype in the config."
            )
    generation = os.path.join(checkpoints.loader(base).index.base_path, "generation_config.json")
    settings = ("chat_template", "tokenizer", "tokenizer_source")
    setting = next((setting for setting in settings if config.get(setting)), None)
    if setting and os.path.exists(generation):
        yield (
            f"The merge will have no generation_config.json, since the config sets {setting}, "
            f"and may not know how to end a text; copy {generation} if its token ids fit, or use "
            "mergekit-metagpt merge, which does it."
        )


def own_head(loader: "LazyTensorLoader", ties: Sequence[tuple[str, str]]) -> str | None:
    """Return the name of a head that is stored beside other embeddings, or None.

    Each name of a head comes with that of the embeddings that it may be tied to.
    """
    for head, table in ties:
        one, other = (loader.get_tensor(name, raise_on_missing=False) for name in (head, table))
        if one is None or other is None:
            continue
        if one.shape != other.shape or (one != other).any():
            return head
    return None
