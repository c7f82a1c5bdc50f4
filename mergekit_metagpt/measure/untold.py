"""Where MergeKit's own command will write a ``config.json`` that does not describe the merge.

``mergekit-metagpt merge`` corrects what it has written. Nobody can correct what ``mergekit-yaml``
writes after the last tensor, but much of it is known when it plans.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import yaml

from mergekit_metagpt.mergekit_private import tied_names

if TYPE_CHECKING:
    from mergekit.io import LazyTensorLoader

    from mergekit_metagpt.measure.checkpoints import Checkpoints

LOG = logging.getLogger(__name__)

_WAY = "correct that when the merge is done, or use mergekit-metagpt merge, which does it"


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
    from mergekit.io.tasks import LoaderCache

    base = checkpoints.base
    said = base.config(LoaderCache().trust_remote_code)
    loaders = {model: checkpoints.loader(model) for model in checkpoints.models}
    ties = tied_names((said.architectures or [""])[0])
    if getattr(said, "tie_word_embeddings", False):
        for model, loader in loaders.items():
            if head := _own_head(loader, ties):
                yield (
                    f"Model {model} has a head of its own ({head}), but the config.json of the "
                    f"merge will say tie_word_embeddings: true, as that of {base} does; {_WAY}."
                )
                break
    written = str(config.get("out_dtype") or config.get("dtype") or "")
    if written.startswith("torch."):
        yield (
            f"The config.json of the merge will say {written}, and no model can be loaded with "
            f"that; write {written.removeprefix('torch.')} in the config."
        )
    if not written:
        stored = reduce(torch.promote_types, map(_dtype, loaders.values()))
        if isinstance(said.dtype, torch.dtype) and stored != said.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (stored, said.dtype)]
            yield (
                f"The merge will be stored in {names[0]}, but its config.json will say {names[1]}, "
                f"as that of {base} does; set dtype in the config."
            )
    for setting in ("chat_template", "tokenizer", "tokenizer_source"):
        if config.get(setting) and (found := _generation_config(loaders[base])):
            yield (
                f"The merge will have no generation_config.json, since the config sets {setting}, "
                f"and may not know how to end a text; copy {found} if its token ids fit, or use "
                "mergekit-metagpt merge, which does it."
            )
            break


def _own_head(loader: "LazyTensorLoader", ties: list[tuple[str, str]]) -> str | None:
    """Return the name of a head that is stored beside other embeddings."""
    for head, table in ties:
        one, other = (loader.get_tensor(name, raise_on_missing=False) for name in (head, table))
        if "embed" in head or one is None or other is None:
            continue
        if one.shape != other.shape or (one != other).any():
            return head
    return None


def _dtype(loader: "LazyTensorLoader") -> torch.dtype:
    """Return the dtype of a matrix of the last layer."""
    names = [name for name in loader.index.tensor_paths if "proj" in name or "attn" in name]
    tensor: Any = loader.get_tensor(max(names or loader.index.tensor_paths))
    dtype: torch.dtype = tensor.dtype
    return dtype


def _generation_config(loader: "LazyTensorLoader") -> str | None:
    path = os.path.join(loader.index.base_path, "generation_config.json")
    return path if os.path.exists(path) else None
