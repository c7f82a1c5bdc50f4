"""Where models are: in a directory, in the cache of the hub, or on the hub."""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from mergekit.common import ModelPath
from mergekit.options import MergeOptions

from mergekit_metagpt.planning.headers import Header, Weights, read_weights
from mergekit_metagpt.wording import BadInputError, reason


def find_weights(model: ModelPath, options: MergeOptions) -> Weights:
    """Read the headers of a model, wherever it is."""
    directory = find_directory(model, options)
    if directory is not None and not os.path.exists(os.path.join(directory, "config.json")):
        if os.path.exists(os.path.join(directory, "adapter_config.json")):
            raise BadInputError(
                f"Model {model} is a LoRA adapter, not a whole model; write it after the model "
                f"that it was trained on, such as base+{model}."
            )
        raise BadInputError(
            f"Model {model} is no checkpoint: {directory} holds no config.json; correct the path, "
            "or download the model again."
        )
    return read_weights(directory, model) if directory is not None else _weights_on_hub(model)


def find_directory(model: ModelPath, options: MergeOptions) -> str | None:
    """Return where a model is on this machine, or None if it has to be read from the hub."""
    if os.path.isdir(model.path):
        return model.path
    if os.path.exists(model.path):
        raise BadInputError(
            f"Model {model} is a file; name the directory that holds it, or merge files with "
            "mergekit-pytorch."
        )
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        snapshot = huggingface_hub.snapshot_download(
            model.path,
            revision=model.revision,
            cache_dir=options.transformers_cache,
            local_files_only=True,
        )
    except HFValidationError:
        raise BadInputError(
            f"Model directory {model} does not exist; correct the path in the merge config."
        ) from None
    except LocalEntryNotFoundError:
        if offline:
            raise BadInputError(
                f"Model {model} is no directory here, and the hub cannot be asked for it offline "
                "(HF_HUB_OFFLINE is set); correct the name, or download the model first."
            ) from None
        _ask_hub_for(model)
        return None
    if offline:  # MergeKit asks the hub for a list of files even then
        raise BadInputError(
            f"Model {model} is downloaded, but MergeKit looks it up on the hub, which it cannot do "
            f"offline (HF_HUB_OFFLINE is set); write its directory {snapshot} in the merge config."
        )
    complete = any(Path(snapshot).glob("*.safetensors")) or any(Path(snapshot).glob("*.bin"))
    return snapshot if complete else None


def _ask_hub_for(model: ModelPath) -> None:
    try:
        # Other requests are repeated for half a minute if they fail; this one is not.
        huggingface_hub.model_info(model.path, revision=model.revision, timeout=10)
    except Exception as error:  # of the hub's client, or of its connection
        raise _unreachable(model, error) from None


def _unreachable(model: ModelPath, error: Exception) -> BadInputError:
    return BadInputError(
        f"Model {model} is no directory here, and cannot be found on the hub ({reason(error)}); "
        "correct the name, run hf auth login if it is gated, or check the connection."
    )


def _weights_on_hub(model: ModelPath) -> Weights:
    """Read the headers of a repository without downloading it."""
    try:
        found = huggingface_hub.get_safetensors_metadata(model.path, revision=model.revision)
    except huggingface_hub.errors.NotASafetensorsRepoError:
        raise BadInputError(
            f"Model {model} has no safetensors files on the hub, and other files cannot be checked "
            f"before they are downloaded; run hf download {model.path} first."
        ) from None
    except Exception as error:
        raise _unreachable(model, error) from None
    return Weights(
        tensors={
            name: Header(tuple(tensor.shape), tensor.dtype, file)
            for file, shard in found.files_metadata.items()
            for name, tensor in shard.tensors.items()
        }
    )
