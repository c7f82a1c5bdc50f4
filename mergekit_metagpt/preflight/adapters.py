"""Adapters: whether PEFT would apply every tensor of them to their base.

MergeKit lets PEFT apply an adapter, and PEFT silently leaves out what does not fit. Here, PEFT
applies it to the same base on the meta device, where tensors have shapes but no data.
"""

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import torch
from huggingface_hub import parse_safetensors_file_metadata, snapshot_download
from mergekit.common import ModelPath, ModelReference, get_auto_cls
from mergekit.options import MergeOptions
from peft.utils import CONFIG_NAME

from mergekit_metagpt.measure.headers import read_header
from mergekit_metagpt.measure.loaders import is_looked_up
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.wording import counted, reason

_WAY = f"apply it to the base that it was trained on, or correct its {CONFIG_NAME}"


def bad_adapters(files: ModelFiles, options: MergeOptions) -> list[str]:
    """Find what PEFT would fail on or leave out, if a model has an adapter."""
    lora = files.model.lora
    found = _adapter(files, lora) if files.config and lora else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT; what they mean is told here
            return list(_differences(files, *found, options)) if found else []
    except Exception as error:  # PEFT and transformers raise many types
        if any(of_meta in str(error) for of_meta in (" meta tensor", "register_meta")):
            return []  # PEFT needs data to go on, and there is no verdict
        return [
            f"PEFT cannot apply adapter {lora} to base {files.model.model} ({reason(error)}); "
            f"{_WAY}."
        ]


def _adapter(files: ModelFiles, lora: ModelPath) -> tuple[str, dict[str, tuple[int, ...]]] | None:
    """Return a directory with the config of an adapter, and the shapes of its tensors.

    An adapter on the hub is skipped if its files are missing or pickled; MergeKit says so.
    """
    if files.adapter:
        headers = read_header(files.adapter, files.model)
        return os.path.dirname(files.adapter), {name: it.shape for name, it in headers.items()}
    if not is_looked_up(ModelReference(model=lora)):
        return None
    path, revision = lora.path, lora.revision
    try:
        directory = snapshot_download(path, revision=revision, allow_patterns=CONFIG_NAME)
        found = parse_safetensors_file_metadata(
            path, "adapter_model.safetensors", revision=revision
        )
    except Exception:  # of the hub's client, or of its connection
        return None
    return directory, {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}


def _differences(
    files: ModelFiles, directory: str, shapes: dict[str, tuple[int, ...]], options: MergeOptions
) -> Iterator[str]:
    """Yield what PEFT would leave out, or not find, in an adapter's file; else raise its error."""
    config: Any = copy.deepcopy(files.config)  # PEFT changes it
    with torch.device("meta"):
        model = get_auto_cls(files.architecture).from_config(
            config, trust_remote_code=options.trust_remote_code
        )
    settings = peft.PeftConfig.from_pretrained(directory)
    prepared: Any = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    result: Any = peft.set_peft_model_state_dict(prepared, empty, low_cpu_mem_usage=True)
    # Only what PEFT would have saved: the rest of the model is no part of an adapter, and what
    # layers share (VeRA) is loaded in another way.
    saved = peft.get_peft_model_state_dict(prepared, save_embedding_layers=False)
    foreign = sorted(set(result.unexpected_keys) - saved.keys())
    missing = {name.replace(".default", "", 1) for name in result.missing_keys}
    missing |= {name.removesuffix(".weight") for name in missing}  # as DoRA's magnitudes are saved
    lacking = sorted((missing & saved.keys()) - shapes.keys())
    what, base = f"Adapter {files.model.lora}", f"base {files.model.model}"
    if foreign:
        yield f"{what} holds {counted(foreign)}, which PEFT would not apply to {base}; {_WAY}."
    elif lacking:  # with foreign ones, the two are most likely the same under two names
        yield (
            f"{what} lacks {counted(lacking)}, for which its {CONFIG_NAME} names a module of "
            f"{base}; {_WAY}."
        )
    else:
        prepared.merge_and_unload()
