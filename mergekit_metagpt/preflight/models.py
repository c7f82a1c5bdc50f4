"""The models that a config names: where they are, and whether they are checkpoints."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_metagpt.preflight.configs import DTYPES
from mergekit_metagpt.preflight.headers import Header, Weights, read_header, read_weights
from mergekit_metagpt.preflight.wording import PreflightError, instead, reason
from mergekit_metagpt.survey import layer_of


def number_of_layer(tensor: str) -> str | None:
    """Return the number of the layer that a tensor belongs to, whatever its prefix is.

    >>> number_of_layer("model.layers.3.mlp.experts.7.w1.weight")
    '3'
    """
    return (layer_of(tensor) or "").rpartition(".")[2] or None


@dataclass(frozen=True)
class Checkpoint:
    """What can be known of a model without reading a tensor.

    Attributes:
        model: the reference that the config has.
        config: the model's own; None if it cannot be read.
        weights: the headers. For an adapter that MergeKit has still to apply, those of the
            model that it will be applied to.
        adapter: the adapter's weight file.
        to_apply: where MergeKit will write the model with its adapter applied, before merging.
        problems: one sentence each.
    """

    model: ModelReference
    config: PretrainedConfig | None = None
    weights: Weights = field(default_factory=Weights)
    adapter: str | None = None
    to_apply: str | None = None
    problems: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> frozenset[tuple[int, int]]:
        """Device and inode of each weight file, the adapter's too: the same for every spelling."""
        if self.model.lora and not self.adapter:
            return frozenset()  # on the hub
        files = [*self.weights.files, *([self.adapter] if self.adapter else [])]
        stats = [os.stat(file) for file in files if os.path.isfile(file)]
        return frozenset((s.st_dev, s.st_ino) for s in stats)

    @cached_property
    def by_layer(self) -> dict[str | None, dict[str, Header]]:
        """The headers of each layer; those of no layer under None."""
        layers: dict[str | None, dict[str, Header]] = {}
        for name, header in self.weights.tensors.items():
            layers.setdefault(number_of_layer(name), {})[name] = header
        return layers

    @property
    def architecture(self) -> str:
        """The class that the model's config names."""
        return str((self.config.architectures or [""])[0]) if self.config else ""

    @cached_property
    def description(self) -> ModelArchitecture | None:
        """What MergeKit knows of that class; None if it has to guess."""
        return arch_info_for_config(self.config) if self.config else None


def open_checkpoint(model: ModelReference, options: MergeOptions) -> Checkpoint:
    """Look at a model; what is wrong with it becomes its problems."""
    if model.lora:
        return _with_adapter(model, model.lora, options)
    try:
        weights = _find(model.model, options)
        config = _config(model, options, weights.directory or None)
    except PreflightError as error:
        return Checkpoint(model, problems=error.args)
    problems = tuple(weights.problems)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "quantization_config")
        problems = (
            f"Model {model} is quantized ({method}, says its config.json), and quantized weights "
            "cannot be merged; use the checkpoint that it was made from.",
        )
    return Checkpoint(model, config, weights, problems=problems)


def _with_adapter(model: ModelReference, lora: ModelPath, options: MergeOptions) -> Checkpoint:
    """Look at a model whose adapter MergeKit applies first, unless it has done so before."""
    checkpoint = replace(
        open_checkpoint(model.model_copy(update={"lora": None}), options), model=model
    )
    problems = list(checkpoint.problems)
    adapter = None
    try:
        adapter = _adapter(model, lora, options)
    except PreflightError as error:
        problems += error.args
    cache, dtype = options.lora_merge_cache, options.lora_merge_dtype
    if dtype and dtype.removeprefix("torch.") not in DTYPES:
        problems.append(
            f"MergeKit cannot apply adapters in --lora-merge-dtype {dtype}; "
            f"{instead(dtype, DTYPES)}."
        )
        cache = None
    elif not cache:
        problems.append(
            f"Model {model} has an adapter to be applied, for which MergeKit needs a directory; "
            "pass --lora-merge-cache DIRECTORY."
        )
    if not cache:
        return replace(checkpoint, adapter=adapter, problems=tuple(problems))
    # As MergeKit names it.
    parts: list[str] = [part._unique_id() for part in (model.model, lora)]  # type: ignore[no-untyped-call]
    applied = os.path.join(cache, "_".join(parts))
    weights = checkpoint.weights
    to_apply: str | None = applied
    if os.path.exists(applied):
        weights, to_apply = read_weights(applied, model), None
        if weights.problems:
            problems.append(
                f"The LoRA cache {applied} of model {model} is incomplete; remove that directory."
            )
    return replace(
        checkpoint, weights=weights, adapter=adapter, to_apply=to_apply, problems=tuple(problems)
    )


def _adapter(model: ModelReference, lora: ModelPath, options: MergeOptions) -> str | None:
    """Return the path of an adapter's weights, if they are on this machine."""
    directory = _directory(lora, options)
    if directory is None:
        return None
    try:
        json.loads(Path(directory, "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreflightError(
            f"Adapter {lora} of model {model} has no adapter_config.json; correct the path, or "
            "save the adapter again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PreflightError(
            f"The adapter_config.json of adapter {lora} of model {model} is corrupt "
            f"({reason(error)}); save the adapter again."
        ) from None
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        path = os.path.join(directory, file)
        if os.path.exists(path):
            read_header(path, model)
            return path
    raise PreflightError(
        f"Adapter {lora} of model {model} has no weights (adapter_model.safetensors); save the "
        "adapter again."
    )


def _find(model: ModelPath, options: MergeOptions) -> Weights:
    directory = _directory(model, options)
    if directory is not None and not os.path.exists(os.path.join(directory, "config.json")):
        raise PreflightError(
            f"Model {model} is no checkpoint: {directory} holds no config.json; correct the path, "
            "or download the model again."
        )
    return read_weights(directory, model) if directory is not None else _weights_on_hub(model)


def _directory(model: ModelPath, options: MergeOptions) -> str | None:
    """Return where a model is on this machine, or None for one that the hub is to be asked for."""
    if os.path.isdir(model.path):
        return model.path
    if os.path.exists(model.path):
        raise PreflightError(
            f"Model {model} is a file; name the directory that it lies in, or merge files with "
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
        raise PreflightError(
            f"Model directory {model} does not exist; correct the path in the merge config."
        ) from None
    except LocalEntryNotFoundError:
        if offline:
            raise PreflightError(
                f"Model {model} is no directory here, and the hub cannot be asked for it offline "
                "(HF_HUB_OFFLINE is set); correct the name, or download the model first."
            ) from None
        return None
    if offline:  # MergeKit asks the hub for a list of files even then
        raise PreflightError(
            f"Model {model} is downloaded, but MergeKit looks it up on the hub, which it cannot do "
            f"offline (HF_HUB_OFFLINE is set); write its directory {snapshot} in the merge config."
        )
    complete = any(Path(snapshot).glob("*.safetensors")) or any(Path(snapshot).glob("*.bin"))
    return snapshot if complete else None


def _weights_on_hub(model: ModelPath) -> Weights:
    """Read the headers of a repository without downloading it."""
    try:
        found = huggingface_hub.get_safetensors_metadata(model.path, revision=model.revision)
    except huggingface_hub.errors.NotASafetensorsRepoError:
        raise PreflightError(
            f"Model {model} has no safetensors files on the hub, and other files cannot be checked "
            f"from afar; run hf download {model.path} first."
        ) from None
    except Exception as error:  # of the hub's client, or of whatever connects it
        raise PreflightError(
            f"Model {model} is no directory here, and the hub cannot be asked for it "
            f"({reason(error)}); correct the name, run hf auth login if it is gated, or check the "
            "connection."
        ) from None
    return Weights(
        tensors={
            name: Header(tuple(tensor.shape), tensor.dtype, file)
            for file, shard in found.files_metadata.items()
            for name, tensor in shard.tensors.items()
        }
    )


def _config(
    model: ModelReference, options: MergeOptions, directory: str | None
) -> PretrainedConfig:
    where = f"The config.json of model {model}"
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:  # transformers raises whatever its many configs raise
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            way = "pass --trust-remote-code if you trust that code"
        else:
            way = "correct it, download it again, or update transformers"
        raise PreflightError(f"{where} cannot be used ({reason(error)}); {way}.") from None
    if len(config.architectures or []) != 1:
        raise PreflightError(
            f"{where} has {config.architectures or 'nothing'} as its architectures, where MergeKit "
            "needs exactly one; add it, such as LlamaForCausalLM."
        )
    return config


def same_models(base: ModelReference | None, checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    """Find models that are listed under two names."""
    seen: dict[frozenset[tuple[int, int]], ModelReference] = {}
    for checkpoint in sorted(checkpoints, key=lambda c: (c.model != base, str(c.model))):
        if not checkpoint.identity:
            continue
        first = seen.setdefault(checkpoint.identity, checkpoint.model)
        if first is not checkpoint.model:
            role = "the base" if first == base else "model"
            yield (
                f"Model {checkpoint.model} is {role} {first} under another name, with the same "
                "weight files; leave one of them out, or spell both alike."
            )
