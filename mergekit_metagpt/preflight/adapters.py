"""Adapters: whether PEFT would apply every tensor of them to their base.

MergeKit lets PEFT apply an adapter, and PEFT silently leaves out what does not fit. Here, PEFT
prepares the same base on the meta device, where tensors have shapes but no data.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch
from mergekit.common import ModelPath, ModelReference, get_auto_cls
from mergekit.options import MergeOptions
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME

from mergekit_metagpt.measure.headers import read_header
from mergekit_metagpt.measure.hub import is_looked_up
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.wording import BadInputError, counted, nearest, reason

Shapes = dict[str, tuple[int, ...]]

_PREFIX = "base_model.model."  # of every name in an adapter
_OWN_BASE = "apply it to the base that it was trained on"
_CORRECT_NAMES = (
    "correct the names there (target_modules, modules_to_save), or save the adapter again"
)


def bad_adapters(files: ModelFiles, options: MergeOptions) -> list[str]:
    """Find what PEFT would fail on or leave out, if a model has an adapter.

    An adapter on the hub is skipped if its files are missing or pickled; MergeKit says so.
    """
    lora = files.model.lora
    on_hub = not files.adapter and lora and is_looked_up(ModelReference(model=lora))
    if not (files.config and lora and (files.adapter or on_hub)):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT; what they mean is told here
        try:
            return _Adapter(files, lora, options).problems()
        except BadInputError as error:
            return list(error.args)
        except Exception:  # of the hub's client, or of its connection
            if on_hub:
                return []
            raise


class _Adapter:
    """An adapter beside its base, without data.

    Attributes:
        held: the shapes of the tensors in its weight file.
        settings: its adapter_config.json.
        prepared: the base as PEFT prepares it for the adapter.
    """

    def __init__(self, files: ModelFiles, lora: ModelPath, options: MergeOptions) -> None:
        self.name = f"Adapter {lora}"
        self.base = f"base {files.model.model}"
        config: Any = copy.deepcopy(files.config)  # PEFT changes it
        self.vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        if files.adapter:
            directory = os.path.dirname(files.adapter)
            headers = read_header(files.adapter, files.model)
            self.held = {name: header.shape for name, header in headers.items()}
        else:
            directory = huggingface_hub.snapshot_download(
                lora.path, revision=lora.revision, allow_patterns=CONFIG_NAME
            )
            found = huggingface_hub.parse_safetensors_file_metadata(
                lora.path, "adapter_model.safetensors", revision=lora.revision
            )
            self.held = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
        self.settings = _settings(directory, lora)
        with _refused(
            f"PEFT cannot apply adapter {lora} to {self.base}",
            f"{_OWN_BASE}, or correct its {CONFIG_NAME}",
        ):
            with torch.device("meta"):
                model = get_auto_cls(files.architecture).from_config(
                    config, trust_remote_code=options.trust_remote_code
                )
            self.prepared: Any = peft.get_peft_model(
                model, copy.deepcopy(self.settings), low_cpu_mem_usage=True
            )

    def problems(self) -> list[str]:
        """Return what PEFT would leave out; if that is nothing, why it cannot merge the adapter."""
        if differences := list(self._differences()):
            return differences
        kind = self.settings.peft_type.value
        refused = f"{self.name} has the peft_type {kind}, and PEFT cannot merge it into {self.base}"
        with _refused(refused, "leave it out"):
            self.prepared.merge_and_unload()
        return []

    def _differences(self) -> Iterator[str]:
        """Yield a sentence for each way in which the file differs from what PEFT expects."""
        wanted = _shapes(peft.get_peft_model_state_dict(self.prepared, save_embedding_layers=False))
        # An adapter may also hold whole embeddings.
        known = _shapes(self.prepared.state_dict()) | wanted
        foreign = [name for name in self.held if name not in known]
        lacking = [name for name in wanted if name not in self.held]
        other = [name for name, shape in self.held.items() if known.get(name, shape) != shape]
        if not (foreign or lacking or other) or self._is_converted():
            return
        if foreign:
            yield self._foreign(foreign)
        elif lacking:  # with foreign ones, the two are most likely the same under two names
            yield (
                f"{self.name} lacks {_counted(lacking, wanted)}, for which its {CONFIG_NAME} "
                f"names a module of {self.base}; {_CORRECT_NAMES}."
            )
        if other:
            yield self._other_shape(other, known)

    def _foreign(self, names: list[str]) -> str:
        what = f"{self.name} holds {_counted(names, self.held)}"
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.settings.peft_type]
        module = names[0].removeprefix(_PREFIX).partition(f".{prefix}")[0]
        module = module.rpartition(".")[0] if module.endswith((".weight", ".bias")) else module
        if module in dict(self.prepared.get_base_model().named_modules()):
            return (
                f"{what}, but its {CONFIG_NAME} does not name that module of {self.base}, so "
                f"that PEFT would leave it out; {_CORRECT_NAMES}."
            )
        return (
            f"{what}, but {self.base} has no module {module}, so that PEFT would leave it out; "
            f"{_OWN_BASE}, or rename the tensor."
        )

    def _other_shape(self, names: list[str], known: Shapes) -> str:
        name = names[0]
        shape, wanted = self.held[name], known[name]
        what = f"{self.name} holds {_counted(names, self.held)}"
        axes = [n for n, pair in enumerate(zip(shape, wanted, strict=False)) if len(set(pair)) > 1]
        if ".lora_" in name and axes == [0 if "_A." in name or name.endswith("_A") else 1]:
            return (
                f"{what}, but the rank in its {CONFIG_NAME} makes it {list(wanted)} on "
                f"{self.base}; correct r or rank_pattern there, or save the adapter again."
            )
        if len(shape) == len(wanted) and [wanted[axis] for axis in axes] == [self.vocabulary]:
            return (
                f"{what}, but {self.base} has a vocabulary of {self.vocabulary} and needs "
                f"{list(wanted)}; resize the base first, with resize_token_embeddings of "
                "transformers, to the vocabulary that the adapter was trained with."
            )
        return f"{what}, but {self.base} needs {list(wanted)}; {_OWN_BASE}."

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


def _settings(directory: str, lora: ModelPath) -> Any:  # a PeftConfig of the adapter's own class
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
    with _refused(f"{file} cannot be used by PEFT", "correct it, or update peft"):
        settings = peft.PeftConfig.from_pretrained(directory)
    if settings.is_prompt_learning:
        raise BadInputError(
            f"Adapter {lora} has the peft_type {kind}, which trains a prompt and no weights, so "
            "that it cannot be merged; leave it out, or train a LoRA adapter."
        )
    return settings


@contextmanager
def _refused(what: str, way: str) -> Iterator[None]:
    """Explain an error of PEFT or transformers, which raise many types."""
    try:
        yield
    except Exception as error:
        if " meta tensor" in str(error):
            raise BadInputError from None  # PEFT needs data to go on, and there is no verdict
        raise BadInputError(f"{what} ({reason(error)}); {way}.") from None


def _counted(names: list[str], shapes: Shapes) -> str:
    first, *others = names
    return counted([f"{first} of shape {list(shapes[first])}", *others])


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
