"""What a merge will write, tensor by tensor, from headers alone."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import StringIO

import torch
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoadTensor
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo

from mergekit_metagpt.measure.headers import Header
from mergekit_metagpt.mergekit_private import convert_checkpoint_tensors, open_loaders
from mergekit_metagpt.names import number_of_layer
from mergekit_metagpt.planning.models import ModelFiles
from mergekit_metagpt.planning.planner import Planner, TensorMerge
from mergekit_metagpt.wording import BadInputError, instead, one_of, reason

LOG = logging.getLogger(__name__)


class PlannerError(BadInputError):
    """MergeKit itself refuses to plan."""


@dataclass(frozen=True)
class Outputs:
    """All tensors of the output."""

    tensors: tuple[TensorMerge, ...]  # in the order in which they will be written
    architecture: ModelArchitecture  # MergeKit's description of the models' tensors
    tokenizer: BuildTokenizer | None  # builds the output's, if the config asks for one
    config: MergeConfiguration
    file: str  # the path of the config, for messages

    @cached_property
    def tokenizer_info(self) -> TokenizerInfo | None:
        """The output's tokenizer, built once; None if the config asks for none."""
        try:
            with redirect_stderr(StringIO()):  # a progress bar that no option turns off
                return self.tokenizer.execute() if self.tokenizer else None
        except Exception as error:  # tokenizers raise many kinds of errors
            raise BadInputError(
                f"MergeKit cannot build the tokenizer that {self.file} asks for ({reason(error)}); "
                "add the files of that tokenizer to the model, or leave the setting out."
            ) from error

    @property
    def rows(self) -> int | None:
        """How many rows the vocabulary tensors will have; None if they stay as they are."""
        if self.tokenizer_info is None:
            return None
        rows, asked = len(self.tokenizer_info.tokenizer.get_vocab()), self.config.tokenizer
        multiple = (asked.pad_to_multiple_of if asked else None) or 1
        return -(-rows // multiple) * multiple

    def shards(self, limit: int) -> list[list[TensorMerge]]:
        """Return the tensors of each weight file, which MergeKit's writer fills one by one.

        ``limit`` is in bytes, 0 for one file.
        """
        shards: list[list[TensorMerge]] = []
        filled, rows = 0, self.rows
        for tensor in self.tensors:
            size = tensor.written_bytes(rows)
            if not shards or (limit > 0 and filled + size > limit):
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += size
        return shards


def plan_outputs(
    config: MergeConfiguration,
    options: MergeOptions,
    models: Mapping[ModelReference, ModelFiles],
    file: str,
) -> Outputs:
    """Plan as MergeKit's ``run_merge`` does; nothing is executed.

    Raises:
        PlannerError: if MergeKit refuses.
    """
    for files in models.values():
        if not (files.description or files.weights.directory):
            raise PlannerError(
                f"MergeKit does not describe {files.architecture}, and has to open "
                f"{files.model} to guess how it is built; run hf download "
                f"{files.model.model.path} first."
            )
    with _loaders_of(models):
        try:
            planner = Planner(config, options)
            known = list(planner.arch_info.modules)
            if unknown := next((name for name in config.modules or {} if name not in known), None):
                raise PlannerError(
                    f"{file} names the module {unknown}, which these models do not have; "
                    f"{instead(unknown, known)}."
                )
            merges = planner.in_order_of_writing()
        except PlannerError:
            raise
        except Exception as error:  # MergeKit raises whatever its many parts raise
            LOG.info("MergeKit's planner failed", exc_info=True)
            is_described = all(files.description for files in models.values())
            if is_described and isinstance(error, (ValueError, RuntimeError)):  # raised on purpose
                raise PlannerError(
                    f"MergeKit cannot plan the merge of {file} ({reason(error)}); correct that."
                ) from error
            kinds = one_of(sorted({files.architecture for files in models.values()}))
            raise PlannerError(
                f"MergeKit fails to plan a merge of {kinds} ({reason(error)}); merge the weight "
                "files with mergekit-pytorch, which needs no plan."
            ) from error
    tensors = []
    for merge in merges:
        found = {model: _found(models[model], load) for model, load in merge.loads.items()}
        stored = {model: it[0] for model, it in found.items() if it}
        read = {model: it[1] for model, it in found.items() if it}
        tensors.append(replace(merge, stored=stored, read=read))
    tokenizer = next((task for task in planner.tasks if isinstance(task, BuildTokenizer)), None)
    return Outputs(tuple(tensors), planner.arch_info, tokenizer, config, file)


@contextmanager
def _loaders_of(models: Mapping[ModelReference, ModelFiles]) -> Iterator[None]:
    # From these headers MergeKit plans without opening models or applying adapters.
    before = {model: open_loaders[model] for model in models if model in open_loaders}
    open_loaders.update(
        {model: LazyTensorLoader(files.weights.index) for model, files in models.items()}
    )
    try:
        yield
    finally:
        for model in models:
            open_loaders.pop(model, None)
        open_loaders.update(before)


def _found(files: ModelFiles, load: LoadTensor) -> tuple[Header, tuple[str, ...]] | None:
    """Return the header of what MergeKit will load, and the names that it is stored under.

    It is stored under this name or an alias, or MergeKit makes it from other tensors of the same
    layer, such as a layer's experts.
    """
    held, own_names = files.weights.tensors, (load.tensor, *(load.aliases or ()))
    for name in (*own_names, *(load.tied_names or ())):
        if name in held:
            return held[name], (name,)
    for name in own_names:
        used: list[str] = []
        # Only those of the same layer, since MergeKit tries each rule on each tensor.
        layer = files.weights.by_layer.get(number_of_layer(name), {}).items()
        sources = {source: partial(_without_data, source, header, used) for source, header in layer}
        model_type = getattr(files.config, "model_type", None)
        tensor = convert_checkpoint_tensors(model_type, sources, name)
        if tensor is not None:
            return Header.of(tensor), tuple(used)
    return None


def _without_data(source: str, header: Header, used: list[str]) -> torch.Tensor:
    used.append(source)
    return torch.empty(header.shape, dtype=header.torch_dtype, device="meta")
