"""Adapters: whether PEFT would apply every tensor of them to their base.

MergeKit lets PEFT apply an adapter, and PEFT silently leaves out what does not fit. Here, PEFT
prepares the same base on the meta device, where tensors have shapes but no data.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME

from mergekit_metagpt.measure.headers import read_header
from mergekit_metagpt.measure.hub import is_looked_up
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.wording import BadInputError, counted, nearest, reason

Shape = tuple[int, ...]

_PREFIX = "base_model.model."  # of every name in an adapter
_OWN_BASE = "apply it to the base that it was trained on"


def bad_adapters(files: ModelFiles, options: MergeOptions) -> list[str]:
    """Find what PEFT would fail on or leave out, if a model has an adapter.

    An adapter on the hub is skipped if its files are missing or pickled; MergeKit says so.
    """
    lora = files.model.lora
    on_hub = not files.adapter and lora and is_looked_up(ModelReference(model=lora))
    if not (files.config and (files.adapter or on_hub)):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT; what they mean is told here
        try:
            adapter = _Adapter(files, options)
            return adapter.differences() or adapter.refusals()
        except BadInputError as error:
            return list(error.args)
        except Exception:  # of the hub's client, or of its connection
            if on_hub:
                return []
            raise


@dataclass(frozen=True)
class _Adapter:
    files: ModelFiles
    options: MergeOptions

    @property
    def name(self) -> str:
        return f"Adapter {self.files.model.lora}"

    @property
    def base(self) -> str:
        return f"base {self.files.model.model}"

    @cached_property
    def held(self) -> dict[str, Shape]:
        """The shapes of the tensors in the adapter's weight file."""
        lora: Any = self.files.model.lora
        if self.files.adapter:
            headers = read_header(self.files.adapter, self.files.model)
            return {name: header.shape for name, header in headers.items()}
        found = huggingface_hub.parse_safetensors_file_metadata(
            lora.path, "adapter_model.safetensors", revision=lora.revision
        )
        return {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}

    @cached_property
    def settings(self) -> Any:  # a PeftConfig of the adapter's own class
        """The adapter_config.json."""
        lora: Any = self.files.model.lora
        directory = (
            os.path.dirname(self.files.adapter)
            if self.files.adapter
            else huggingface_hub.snapshot_download(
                lora.path, revision=lora.revision, allow_patterns=CONFIG_NAME
            )
        )
        file = f"The {CONFIG_NAME} of adapter {lora}"
        raw = json.loads(Path(directory, CONFIG_NAME).read_text(encoding="utf-8"))
        kind, kinds = raw.get("peft_type"), [k.value for k in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        if not kind:
            raise BadInputError(
                f"{file} has no peft_type, so that PEFT cannot apply it; add it, such as "
                '"peft_type": "LORA", or save the adapter again.'
            )
        if kind not in kinds:
            close = nearest(str(kind).upper(), kinds)
            way = f"write {close} instead" if close else "update peft"
            raise BadInputError(
                f"{file} has the peft_type {kind}, which the installed PEFT does not know; {way}."
            )
        try:
            settings = peft.PeftConfig.from_pretrained(directory)
        except Exception as error:  # each type of adapter checks its settings in its own way
            raise BadInputError(
                f"{file} cannot be used by PEFT ({reason(error)}); correct it, or update peft."
            ) from None
        if settings.is_prompt_learning:
            raise BadInputError(
                f"{self.name} has the peft_type {kind}, which trains a prompt and no weights, so "
                "that it cannot be merged; leave it out, or train a LoRA adapter."
            )
        return settings

    @cached_property
    def prepared(self) -> Any:  # a PeftModel
        """The base without data, with room for the adapter."""
        # Both are changed on the way.
        config: Any = copy.deepcopy(self.files.config)
        settings = copy.deepcopy(self.settings)
        try:
            with torch.device("meta"):
                model = get_auto_cls(self.files.architecture).from_config(
                    config, trust_remote_code=self.options.trust_remote_code
                )
            return peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
        except Exception as error:  # of transformers or PEFT, which raise many types
            _require_a_verdict(error)
            raise BadInputError(
                f"PEFT cannot apply adapter {self.files.model.lora} to {self.base} "
                f"({reason(error)}); {_OWN_BASE}, or correct its adapter_config.json."
            ) from None

    def differences(self) -> list[str]:
        """Return a sentence for each way in which the file differs from what PEFT expects."""
        wanted = _shapes(peft.get_peft_model_state_dict(self.prepared, save_embedding_layers=False))
        # An adapter may also hold whole embeddings.
        known = _shapes(self.prepared.state_dict()) | wanted
        foreign = [name for name in self.held if name not in known]
        lacking = [name for name in wanted if name not in self.held]
        other = [name for name, shape in self.held.items() if known.get(name, shape) != shape]
        if not (foreign or lacking or other) or self._is_converted():
            return []
        found = [self._foreign(foreign)] if foreign else []
        if lacking and not foreign:  # otherwise the two are most likely the same under two names
            found.append(
                f"{self.name} lacks {_counted(lacking, wanted)}, for which its adapter_config.json "
                f"names a module of {self.base}; correct the names there (target_modules, "
                "modules_to_save), or save the adapter again."
            )
        return [*found, *self._other_shapes(other, known)]

    def _foreign(self, names: list[str]) -> str:
        first = names[0]
        kind = self.settings.peft_type.value
        what = f"{self.name} holds {_counted(names, self.held)}"
        own = PEFT_TYPE_TO_PREFIX_MAPPING[self.settings.peft_type]
        of = [k.value for k, p in PEFT_TYPE_TO_PREFIX_MAPPING.items() if f".{p}" in first]
        if of and not any(f".{own}" in name for name in self.held):
            return (
                f"{what}, which is of peft_type {of[0]}, but its adapter_config.json says {kind}; "
                "correct it there, or save the adapter again."
            )
        module = first.removeprefix(_PREFIX).partition(f".{own}")[0]
        module = module.rpartition(".")[0] if module.endswith((".weight", ".bias")) else module
        if module in dict(self.prepared.get_base_model().named_modules()):
            return (
                f"{what}, but its adapter_config.json does not name that module of {self.base}, so "
                "that PEFT would leave it out; correct the names there (target_modules, "
                "modules_to_save), or save the adapter again."
            )
        return (
            f"{what}, but {self.base} has no module {module}, so that PEFT would leave it out; "
            f"{_OWN_BASE}, or rename the tensor."
        )

    def _other_shapes(self, names: list[str], known: Mapping[str, Shape]) -> Iterator[str]:
        if not names:
            return
        name = names[0]
        shape, wanted = self.held[name], known[name]
        what = f"{self.name} holds {_counted(names, self.held)}"
        differ = [
            n for n, (one, other) in enumerate(zip(shape, wanted, strict=False)) if one != other
        ]
        config = self.files.config.get_text_config() if self.files.config else None
        rows = getattr(config, "vocab_size", None)
        if ".lora_" in name and differ == [0 if "_A." in name or name.endswith("_A") else 1]:
            yield (
                f"{what}, but the rank in its adapter_config.json makes it {list(wanted)} on "
                f"{self.base}; correct r or rank_pattern there, or save the adapter again."
            )
        elif len(shape) == len(wanted) and [wanted[n] for n in differ] == [rows]:
            yield (
                f"{what}, but {self.base} has a vocabulary of {rows} and needs {list(wanted)}; "
                "resize the base first, with resize_token_embeddings of transformers, to the "
                "vocabulary that the adapter was trained with."
            )
        else:
            yield f"{what}, but {self.base} needs {list(wanted)}; {_OWN_BASE}."

    def _is_converted(self) -> bool:
        """Whether PEFT loads the file all the same, since it knows its names as older ones."""
        empty = {n: torch.empty(shape, device="meta") for n, shape in self.held.items()}
        try:
            result: Any = peft.set_peft_model_state_dict(
                self.prepared, empty, low_cpu_mem_usage=True
            )
        except Exception:  # whatever it is, the file does not fit
            return False
        lacking = [name for name in result.missing_keys if ".default" in name]
        return not (lacking or result.unexpected_keys)

    def refusals(self) -> list[str]:
        """Find adapters that PEFT can apply, but not merge."""
        try:
            self.prepared.merge_and_unload()
        except Exception as error:  # each type of adapter refuses in its own way
            _require_a_verdict(error)
            return [
                f"{self.name} has the peft_type {self.settings.peft_type.value}, and PEFT cannot "
                f"merge it into {self.base} ({reason(error)}); leave it out."
            ]
        return []


def _require_a_verdict(error: Exception) -> None:
    """Raise a BadInputError without a sentence if PEFT needs data to go on."""
    if " meta tensor" in str(error):
        raise BadInputError


def _counted(names: list[str], shapes: Mapping[str, Shape]) -> str:
    first, *others = names
    return counted([f"{first} of shape {list(shapes[first])}", *others])


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
