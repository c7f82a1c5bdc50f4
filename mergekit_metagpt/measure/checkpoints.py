"""Read checkpoints for a survey, with MergeKit's architectures and loaders."""

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tqdm
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.headers import Header, read_header
from mergekit_metagpt.measure.hub import HubLoader
from mergekit_metagpt.measure.identity import identity_of, on_hub, stat_of
from mergekit_metagpt.measure.loaders import forget_models, load_task, weight_files
from mergekit_metagpt.measure.read_ahead import AHEAD
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.tensors import Device, Measured, TensorMeasurer
from mergekit_metagpt.measure.ties import named_once, twin_of
from mergekit_metagpt.measure.unread import warn_of_unread
from mergekit_metagpt.measure.vocabularies import (
    DifferentVocabularyError,
    tokenizers_agree,
)
from mergekit_metagpt.names import canonical
from mergekit_metagpt.workers import Mapper, in_this_process

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """A base and its experts: model directories, or single files of tensors.

    MergeKit merges directories with ``mergekit-yaml``, and single files with ``mergekit-pytorch``.

    Attributes:
        base: θ_0.
        experts: θ_t, in canonical order.
    """

    base: ModelReference
    experts: tuple[ModelReference, ...]

    @classmethod
    def of(
        cls, base: ModelReference | str, experts: Sequence[ModelReference | str]
    ) -> "Checkpoints":
        """Parse references as MergeKit does: ``model``, ``model@revision``, ``model+lora``."""
        references = [ModelReference.model_validate(expert) for expert in experts]
        return cls(ModelReference.model_validate(base), tuple(canonical(references)))

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The base, then the experts."""
        return (self.base, *self.experts)

    @property
    def are_files(self) -> bool:
        """Whether the references name single files of tensors."""
        return os.path.isfile(self.base.model.path)

    def loader(self, model: ModelReference) -> LazyTensorLoader:
        """Return the loader that MergeKit reads the model with."""
        if self.are_files:
            loader: LazyTensorLoader = mergekit_private.SimpleLoaderCache().get(model.model.path)
            return loader
        return LoaderCache().get(model)

    def close_files(self) -> None:
        """Close the weight files. The loaders open them again when a tensor is read."""
        for model in self.models:
            self.loader(model).flush()  # type: ignore[no-untyped-call]

    def forget_files(self) -> None:
        """Close the weight files, and forget which files the models have."""
        forget_models(self.models)

    def identity(self, model: ModelReference) -> list[Any]:
        """Return what a model is: its files, or those of the model with its adapter applied.

        Its tokenizer counts, since it decides whether vocabularies agree.
        """
        loader = self.loader(model)
        if self.are_files:
            return identity_of(model.model.path)
        if isinstance(loader, HubLoader):
            identity: list[Any] = [model.model.path, loader.commit]
        else:
            identity = identity_of(loader.index.base_path)
            if not on_hub(loader.index.base_path):  # an index may name files in folders below
                identity += [[str(path), stat_of(path)] for path in weight_files(model)]
        if model.lora and os.path.isdir(model.model.path):
            identity += identity_of(model.model.path)
        return [*identity, LoaderCache().trust_remote_code]

    def warn(self, survey: Survey) -> None:
        """Log what a merge of these models leaves out."""
        if not self.are_files:
            held = self.loader(self.base).index.tensor_paths
            warn_of_unread(self.base, self.weights(), held)
        for why in survey.left_out.values():
            LOG.warning("%s; the tensor does not count towards the coefficients.", why)

    def read_ahead(self, model: ModelReference, tensor: str | None) -> None:
        """Let the disk read a tensor of a model, and what follows it in its file."""
        loader = self.loader(model)
        index = loader.index
        if tensor in index.tensor_paths and not isinstance(loader, HubLoader):
            AHEAD.begin(os.path.join(index.base_path, index.tensor_paths[tensor]), tensor)

    def shape_of_base(self, tensor: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor of the base, or None if the base has no such tensor.

        A merge may have more layers than the base; then a tensor is like that of the first layer.
        """
        if tensor not in self.loader(self.base).index.tensor_paths:
            tensor = re.sub(r"(?<=\.)\d+(?=\.)", "0", tensor, count=1)
        header = self._header_of_base(tensor)
        return None if header is None else header.shape

    def parameters_of_base(self) -> int:
        """Return how many numbers the base holds."""
        headers = map(self._header_of_base, self.loader(self.base).index.tensor_paths)
        return sum(math.prod(header.shape) for header in headers if header is not None)

    def _header_of_base(self, tensor: str) -> Header | None:
        loader = self.loader(self.base)
        if isinstance(loader, HubLoader):
            return loader.headers.get(tensor)
        file = loader.index.tensor_paths.get(tensor)
        if file is None:
            return None
        return read_header(os.path.join(loader.index.base_path, file), self.base).get(tensor)

    def weights(self) -> list[WeightInfo]:
        """Return the parameters to compare, ordered so that each shard is opened once."""
        index = self.loader(self.base).index
        if self.are_files:
            # If a file lacks a tensor, mergekit-pytorch has stopped, unless it was told to go on.
            common = set(index.tensor_paths).intersection(
                *(self.loader(expert).index.tensor_paths for expert in self.experts)
            )
            weights = [WeightInfo(name=name) for name in index.tensor_paths if name in common]
        else:
            weights = self._architecture_weights()
        return sorted(
            weights, key=lambda w: index.tensor_paths.get(self.stored_name(self.base, w) or "", "")
        )

    def _architecture_weights(self) -> list[WeightInfo]:
        cache = LoaderCache()
        config = MergeConfiguration.model_validate(
            {
                "merge_method": "metagpt",
                "base_model": self.base,
                "models": [{"model": model} for model in self.models],
            }
        )
        options = MergeOptions(
            allow_crimes=True,  # the merge decides whether architectures may differ
            trust_remote_code=cache.trust_remote_code,
            transformers_cache=cache.hf_cache_dir,
            lazy_unpickle=cache.lazy_unpickle,
        )
        architecture = get_architecture_info(config, options)
        return architecture.all_weights(self.base.config(cache.trust_remote_code))

    def stored_name(self, model: ModelReference, weight: WeightInfo) -> str | None:
        """Return the name under which a model stores a weight, or None if it lacks the weight.

        This is the weight's own name, an alias, or the name of a weight tied to it.
        """
        if self.are_files:
            return weight.name
        held = self.loader(model).index.tensor_paths
        names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        return next((name for name in names if name in held), None)

    def load(self, model: ModelReference, weight: WeightInfo, device: Device) -> Tensor | None:
        """Return a weight as it is stored, or None if the model lacks it."""
        self.read_ahead(model, self.stored_name(model, weight))
        if self.are_files:
            return self.loader(model).get_tensor(
                weight.name, device=str(device), raise_on_missing=False
            )
        return load_task(model, weight, device).execute()

    def files(self) -> list[str]:
        """Return the paths of all weight files."""
        indexes = [self.loader(model).index for model in self.models]
        return [os.path.join(i.base_path, shard.filename) for i in indexes for shard in i.shards]

    def stored(self, model: ModelReference, name: str | None) -> Tensor | None:
        """Return a weight as it is stored, or None if there is none of this name."""
        weight = self._weights_by_name.get(name or "")
        return None if weight is None else self.load(model, weight, "cpu")

    @cached_property
    def _weights_by_name(self) -> dict[str, WeightInfo]:
        return {weight.name: weight for weight in self.weights()}

    def survey(
        self,
        device: Device,
        progress: bool,
        products: bool = False,
        mapper: Mapper = in_this_process,
    ) -> Survey:
        """Measure every task vector as it is stored; see :func:`survey_checkpoints`."""
        tokenizers_agree.cache_clear()  # the files may have changed since the last survey
        measured: dict[str, Measured] = {}
        left_out: dict[str, str] = {}
        tieable: list[WeightInfo] = []
        weights, tied = named_once(self)
        one = TensorMeasurer(self.base, self.experts, self.load, device, products)
        bar = tqdm.tqdm(
            mapper(one, weights),
            "Measuring task vectors",
            len(weights),
            unit="tensor",
            disable=not progress,
        )
        for weight, tensor in zip(weights, bar, strict=True):
            if isinstance(tensor, DifferentVocabularyError):
                left_out[weight.name] = str(tensor)
                continue
            if tensor is None:
                continue
            if self.are_files or weight.vocabulary_axis is not None or weight.tied_names:
                twin = twin_of(self, weight, tieable, measured, tensor)
                if twin is not None:  # tied, and stored twice
                    tied[weight.name] = twin.name
                    continue
                tieable.append(weight)
            measured[weight.name] = tensor
        return Survey(
            self.experts,
            squared_norms={name: tensor.norms for name, tensor in measured.items()},
            tied=tied,
            dtypes={name: tensor.dtype for name, tensor in measured.items()},
            left_out=left_out,
            sizes={name: tensor.size for name, tensor in measured.items()},
            grams={name: t.products for name, t in measured.items()} if products else None,
            bases={name: t.base for name, t in measured.items()} if products else {},
        )


def survey_checkpoints(
    base: ModelReference | str,
    experts: Sequence[ModelReference | str],
    *,
    device: Device = "cpu",
    progress: bool = True,
    products: bool = False,
) -> Survey:
    """Survey checkpoints on disk or on the Hugging Face hub.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it (``model``, ``model@revision``,
            ``model+lora``), a ``ModelReference``, or one file of tensors.
        experts: θ_t, T models, each given like the base.
        device: the torch device that computes.
        progress: whether to show a progress bar.
        products: whether to measure inner products too.

    Returns:
        The survey of the tensors as they are stored, with the experts in the given order. It
        leaves out vocabulary tensors whose shapes or tokenizers differ.

    Raises:
        ValueError: if an expert lacks a tensor of the base or has it in a different shape, or if
            a tensor holds NaN or Inf. The message names the model and the tensor.
    """
    checkpoints = Checkpoints.of(base, experts)
    given = [ModelReference.model_validate(expert) for expert in experts]
    survey = checkpoints.survey(device, progress, products)
    checkpoints.warn(survey)
    return survey.in_order_of(given)
