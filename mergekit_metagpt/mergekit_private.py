"""Every use of MergeKit, torch and transformers beyond their public API.

No other module uses such a name. Import the names of :data:`PRIVATE` from here::

    from mergekit_metagpt.mergekit_private import model_out_config

They are looked up on first use, because MergeKit is half imported at registration. Details that
are no names of a module, such as the text of an error, have a function here. Each has a test. A
new release of these libraries must pass these tests before ``pyproject.toml`` allows it.
"""

import re
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# The logger to which MergeKit's `run_merge` reports errors, with a traceback.
MERGE_LOGGER = "mergekit.merge"

# By the name to import: its module, a colon, and its name there, which may have dots.
PRIVATE = {
    # The steps of run_merge besides the merge itself.
    "model_out_config": "mergekit.merge:_model_out_config",
    "update_config_vocab": "mergekit.merge:_update_config_vocab",
    "set_chat_template": "mergekit.merge:_set_chat_template",
    "copy_tokenizer": "mergekit.merge:_copy_tokenizer",
    "copy_tagalong_files": "mergekit.merge:_copy_tagalong_files",
    # A merge method overrides this to see all tensors of a call.
    "execute": "mergekit.merge_methods.base:GroupMergeMethod._execute",
    # Names the directory in the LoRA cache that holds a model with its adapter applied.
    "unique_id": "mergekit.common:ModelPath._unique_id",
    # The loaders of all threads, by model.
    "open_loaders": "mergekit.io.tasks:LoaderCache.loaders",
    # The loaders of mergekit-pytorch.
    "SimpleLoaderCache": "mergekit.scripts.merge_raw_pytorch:SimpleLoaderCache",
    "convert_checkpoint_tensors": "mergekit.architecture.conversion:convert_checkpoint_tensors",
    "compile_template": "transformers.utils.chat_template_utils:_compile_jinja_template",
    # The parameters that mergekit-evolve searches, by method.
    "METHOD_PARAM_MAPS": "mergekit.evo.genome:METHOD_PARAM_MAPS",
    "add_merge_options": "mergekit.options:add_merge_options",
}


def __getattr__(name: str) -> Any:
    """Import a name of :data:`PRIVATE` when it is first used (PEP 562)."""
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(PRIVATE[name])


def wants_remote_code(error: BaseException) -> bool:
    """Return whether transformers refuses a model because it needs ``trust_remote_code``."""
    return "custom code" in str(error) or "trust_remote_code" in str(error)


def is_ignored(architecture: str, name: str) -> bool:
    """Return whether a class of transformers ignores a tensor in its checkpoints.

    A pattern has to fit from the start of a part of the name: attn.bias is no c_attn.bias.
    """
    patterns = _class_attribute(architecture, "_keys_to_ignore_on_load_unexpected")
    starts = [found.start() for pattern in patterns for found in re.finditer(pattern, name)]
    return any(start == 0 or "." in name[start - 1 : start + 1] for start in starts)


def tied_names(architecture: str) -> list[tuple[str, str]]:
    """Return the pairs of names that a class of transformers ties, if its config says so."""
    return list(dict(_class_attribute(architecture, "_tied_weights_keys")).items())


def _class_attribute(architecture: str, name: str) -> Any:
    """Return an attribute of a class of transformers; empty for one with code of its own."""
    import transformers

    return getattr(getattr(transformers, architecture, None), name, None) or ()


def is_cut_short(error: BaseException) -> bool:
    """Return whether safetensors found that a file's length does not match its header."""
    return any(text in str(error) for text in ("not fully covered", "invalid header length"))


def squared_difference(first: "Tensor", second: "Tensor", out: "Tensor") -> "Tensor":
    """Write (first − second)², element by element, into ``out``.

    All three have the same dtype and shape. ATen's operation needs one pass and no temporary
    tensor; torch's public ``mse_loss`` has no ``out``.
    """
    import torch

    result: Tensor = torch.ops.aten.mse_loss.out(first, second, 0, out=out)  # 0: no reduction
    return result
