"""Read checkpoints for a survey, with MergeKit's architectures and loaders."""

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from safetensors import safe_open
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.measure.hub import HubLoader, HubModel, open_on_hub
from mergekit_metagpt.measure.read_ahead import AHEAD
from mergekit_metagpt.measure.survey import Survey
from mergekit_metagpt.measure.tensors import Device, Measured, TensorMeasurer
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
        for model in self.models:
            mergekit_private.open_loaders.pop(model, None)
            mergekit_private.SimpleLoaderCache().loaders.pop(model.model.path, None)

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
        loader = self.loader(self.base)
        if tensor not in loader.index.tensor_paths:
            tensor = re.sub(r"(?<=\.)\d+(?=\.)", "0", tensor, count=1)
        path = loader.index.tensor_paths.get(tensor)
        if path is None:
            return None
        if path.endswith(".safetensors") and not isinstance(loader, HubLoader):
            with safe_open(os.path.join(loader.index.base_path, path), "pt") as file:
                return tuple(file.get_slice(tensor).get_shape())
        found = loader.get_tensor(tensor)
        return None if found is None else tuple(found.shape)

    def parameters_of_base(self) -> int:
        """Return how many numbers the base holds; an estimate, unless they are in safetensors."""
        index = self.loader(self.base).index
        numbers = 0
        for shard in index.shards:
            path = os.path.join(index.base_path, shard.filename)
            if path.endswith(".safetensors") and os.path.exists(path):
                with safe_open(path, "pt") as file:
                    names = file.keys()
                    numbers += sum(math.prod(file.get_slice(n).get_shape()) for n in names)
            elif os.path.exists(path):
                numbers += os.path.getsize(path) // 2
        return numbers

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
        return _load_task(model, weight, device).execute()

    def files(self) -> list[str]:
        """Return the paths of all weight files."""
        indexes = [self.loader(model).index for model in self.models]
        return [os.path.join(i.base_path, shard.filename) for i in indexes for shard in i.shards]

    def load_base(self, name: str) -> Tensor | None:
        """Return a tensor of the base as it is stored; ``name`` is its name in the survey."""
        weight = self._weights_by_name.get(name)
        return None if weight is None else self.load(self.base, weight, "cpu")

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
        left_out: list[str] = []
        tieable: list[WeightInfo] = []
        if not self.are_files:
            held = self.loader(self.base).index.tensor_paths
            warn_of_unread(self.base, self.weights(), held)
        weights, tied = self._named_once()
        one = TensorMeasurer(self.base, self.experts, self.load, device, products)
        for weight, tensor in zip(weights, mapper(one, weights, progress), strict=True):
            if isinstance(tensor, DifferentVocabularyError):
                LOG.warning("%s; the tensor does not count towards the coefficients.", tensor)
                left_out.append(weight.name)
                continue
            if tensor is None:
                continue
            if self.are_files or weight.vocabulary_axis is not None or weight.tied_names:
                twin = self._twin(weight, tensor, tieable, measured)
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
            left_out=tuple(left_out),
            sizes={name: tensor.size for name, tensor in measured.items()},
            grams={name: t.products for name, t in measured.items()} if products else None,
            bases={name: t.base for name, t in measured.items()} if products else {},
            source=self,
        )

    def _twin(
        self,
        weight: WeightInfo,
        tensor: Measured,
        others: Sequence[WeightInfo],
        measured: dict[str, Measured],
    ) -> WeightInfo | None:
        """Return a weight among ``others`` that equals this one in every model, or None."""
        if not any(tensor.norms):
            return None
        for other in others:
            if tensor.norms == measured[other.name].norms and self._equal(weight, other):
                return other
        return None

    def _named_once(self) -> tuple[list[WeightInfo], dict[str, str]]:
        """Return each stored weight once, and a map from every tied name to that weight's name."""
        weights: dict[tuple[str | None, ...], WeightInfo] = {}
        tied: dict[str, str] = {}
        for weight in self.weights():
            names = tuple(self.stored_name(model, weight) for model in self.models)
            # A weight without a stored name is computed from others, so it is tied to none.
            first = weights.setdefault((weight.name, None) if None in names else names, weight)
            if first is not weight:
                tied[weight.name] = first.name
        return list(weights.values()), tied

    def _equal(self, weight: WeightInfo, other: WeightInfo) -> bool:
        """Return whether two weights are equal in every model, the base included."""
        return all(
            torch.equal(first, second)
            for model in self.models
            if (first := self.load(model, weight, "cpu")) is not None
            and (second := self.load(model, other, "cpu")) is not None
        )


def _load_task(model: ModelReference, weight: WeightInfo, device: Device = "cpu") -> LoadTensor:
    return LoadTensor(
        model=model,
        tensor=weight.name,
        dtype=weight.force_dtype,
        device=str(device),
        optional=True,
        aliases=weight.aliases,
        tied_names=weight.tied_names,
    )


def forget_files() -> None:
    """Forget open files and tokenizers, so that every thread reads the models again."""
    mergekit_private.open_loaders.clear()
    tokenizers_agree.cache_clear()


def set_up_worker(options: MergeOptions, on_hub: Sequence[HubModel] = ()) -> None:
    """Give a worker process the loader options of the main one, and let it read files again.

    Args:
        options: the loader options.
        on_hub: the models that are read from the hub.
    """
    forget_files()
    open_on_hub(on_hub)
    LoaderCache().setup(options)


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
    return checkpoints.survey(device, progress, products).in_order_of(given)
