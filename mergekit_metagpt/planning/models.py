"""The models that a config names: where they are, and whether they are checkpoints."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelPath, ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_metagpt.measure.headers import FLOAT_NAMES, read_header
from mergekit_metagpt.measure.locations import Directory, Repository, locate
from mergekit_metagpt.measure.weights import Weights, read_weights
from mergekit_metagpt.mergekit_private import unique_id, wants_remote_code
from mergekit_metagpt.wording import BadInputError, instead, reason


@dataclass(frozen=True)
class ModelFiles:
    """What can be known of a model without reading a tensor."""

    model: ModelReference  # as the config names it
    config: PretrainedConfig | None = None  # None if it cannot be read
    # Of an adapter that MergeKit has not applied yet, those of the model that it is applied to.
    weights: Weights = field(default_factory=Weights)
    adapter: str | None = None  # its weight file
    to_apply: str | None = None  # where MergeKit will first write the model with its adapter
    problems: tuple[str, ...] = ()  # what is wrong, one sentence each

    @property
    def architecture(self) -> str:
        """The class that the model's config names."""
        return str((self.config.architectures or [""])[0]) if self.config else ""

    @cached_property
    def description(self) -> ModelArchitecture | None:
        """MergeKit's description of that class; None if it has none, and has to guess."""
        return arch_info_for_config(self.config) if self.config else None

    @property
    def is_tied(self) -> bool | None:
        """Whether the config says that the head is the embeddings; None if it does not say."""
        configs = [self.config, self.config.get_text_config()] if self.config else []
        said = {getattr(config, "tie_word_embeddings", None) for config in configs} - {None}
        return any(said) if said else None


def find_model_files(model: ModelReference, options: MergeOptions) -> ModelFiles:
    """Look at a model; the result lists what is wrong with it as problems."""
    if model.lora:
        return _with_adapter(model, model.lora, options)
    try:
        place = locate(model.model, options)
        if not place.holds("config.json"):
            raise BadInputError(
                f"Model {model} is a LoRA adapter, not a whole model; write it after the model "
                f"that it was trained on, such as base+{model}."
                if place.holds("adapter_config.json")
                else f"Model {model} is no checkpoint: {place.file('config.json')} is missing; "
                "correct the path, or download the model again."
            )
        weights, config = read_weights(place), _config(model, options)
    except BadInputError as error:
        return ModelFiles(model, problems=error.args)
    problems = tuple(weights.problems)
    if quantization := getattr(config, "quantization_config", None):
        method = dict(quantization).get("quant_method", "quantization_config")
        problems = (
            f"Model {model} is quantized ({method}, says its config.json), and quantized weights "
            "cannot be merged; use the checkpoint that it was made from.",
        )
    return ModelFiles(model, config, weights, problems=problems)


def require_models(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Raise a BadInputError that says what is wrong with models, if anything is."""
    problems = [p for model in models for p in find_model_files(model, options).problems]
    if problems:
        raise BadInputError(*problems)


def _with_adapter(model: ModelReference, lora: ModelPath, options: MergeOptions) -> ModelFiles:
    base = find_model_files(model.model_copy(update={"lora": None}), options)
    problems, weights = list(base.problems), base.weights
    adapter = to_apply = None
    try:
        adapter = _adapter(model, lora, options)
    except BadInputError as error:
        problems += error.args
    dtype = options.lora_merge_dtype
    if dtype and dtype.removeprefix("torch.") not in FLOAT_NAMES:
        problems.append(
            f"MergeKit cannot apply adapters in --lora-merge-dtype {dtype}; "
            f"{instead(dtype, FLOAT_NAMES)}."
        )
    elif options.lora_merge_cache:
        name = "_".join(unique_id(path) for path in (model.model, lora))  # as MergeKit's
        to_apply = os.path.join(options.lora_merge_cache, name)
    else:
        problems.append(
            f"Model {model} has an adapter, and MergeKit needs a directory to apply it in; "
            "pass --lora-merge-cache DIRECTORY."
        )
    if to_apply and os.path.exists(to_apply):
        weights = read_weights(Directory(to_apply, str(model)))
        if weights.problems:
            problems.append(
                f"The LoRA cache {to_apply} of model {model} is incomplete; remove that directory."
            )
        to_apply = None
    return ModelFiles(model, base.config, weights, adapter, to_apply, tuple(problems))


def _adapter(model: ModelReference, lora: ModelPath, options: MergeOptions) -> str | None:
    """Return the path of an adapter's weights, if they are on this machine."""
    place = locate(lora, options)
    if isinstance(place, Repository):
        return None
    try:
        json.loads(place.text("adapter_config.json")).items()
    except FileNotFoundError:
        raise BadInputError(
            f"Adapter {lora} of model {model} has no adapter_config.json; correct the path, save "
            "the adapter again, or list it as a model of its own if it is a whole one."
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInputError(
            f"The adapter_config.json of adapter {lora} of model {model} is corrupt "
            f"({reason(error)}); save the adapter again."
        ) from None
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        if place.holds(file):
            read_header(place.file(file), model)
            return place.file(file)
    raise BadInputError(
        f"Adapter {lora} of model {model} has no weights (adapter_model.safetensors); save the "
        "adapter again."
    )


def _config(model: ModelReference, options: MergeOptions) -> PretrainedConfig:
    where = f"The config.json of model {model}"
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:  # transformers raises whatever its many configs raise
        if wants_remote_code(error):
            way = "pass --trust-remote-code if you trust that code"
        else:
            way = "correct it, download it again, or update transformers"
        raise BadInputError(f"{where} cannot be used ({reason(error)}); {way}.") from None
    if len(config.architectures or []) != 1:
        raise BadInputError(
            f"{where} has {config.architectures or 'nothing'} as its architectures, but MergeKit "
            "needs exactly one; add it, such as LlamaForCausalLM."
        )
    return config
