"""Checkpoints as a survey reads them, through MergeKit's architectures and loaders."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.coefficients import Norms
from mergekit_metagpt.measure.survey import Survey, TensorInputs, sum_matrices
from mergekit_metagpt.measure.unread import warn_of_unread
from mergekit_metagpt.measure.vocabularies import (
    DifferentVocabularyError,
    compare_vocabularies,
    tokenizers_agree,
)
from mergekit_metagpt.names import canonical
from mergekit_metagpt.task_vectors import inner_products, promoted_dtype
from mergekit_metagpt.workers import Mapper, in_this_process

LOG = logging.getLogger(__name__)

Device = torch.device | str
# Path, inode, size in bytes and time of change in nanoseconds of each weight file.
FileStats = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Checkpoints:
    """A base and its experts: model directories, or the files of ``mergekit-pytorch``.

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
        """Let go of the weight files; they are opened again when a tensor is read."""
        for model in self.models:
            self.loader(model).flush()  # type: ignore[no-untyped-call]

    def weights(self) -> list[WeightInfo]:
        """Return the parameters to compare, ordered so that each shard is opened once."""
        index = self.loader(self.base).index
        if self.are_files:
            # With tensors missing somewhere, mergekit-pytorch stops, or was told to go on.
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
            allow_crimes=True,  # whether architectures may differ is the merge's to decide
            trust_remote_code=cache.trust_remote_code,
            transformers_cache=cache.hf_cache_dir,
            lazy_unpickle=cache.lazy_unpickle,
        )
        architecture = get_architecture_info(config, options)
        return architecture.all_weights(self.base.config(cache.trust_remote_code))

    def stored_name(self, model: ModelReference, weight: WeightInfo) -> str | None:
        """Return the name a weight is stored under: its own, an alias, or a tied one."""
        if self.are_files:
            return weight.name
        held = self.loader(model).index.tensor_paths
        names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        return next((name for name in names if name in held), None)

    def load(self, model: ModelReference, weight: WeightInfo, device: Device) -> Tensor | None:
        """Return a weight as it is stored, or None where the model has none."""
        if self.are_files:
            return self.loader(model).get_tensor(
                weight.name, device=str(device), raise_on_missing=False
            )
        return _load_task(model, weight, device).execute()

    def file_stats(self) -> FileStats:
        """Return what tells whether a weight file has changed."""
        paths = []
        for model in self.models:
            index = self.loader(model).index
            paths += [os.path.join(index.base_path, shard.filename) for shard in index.shards]
        stats = [(path, os.stat(path)) for path in paths]
        return tuple((path, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in stats)

    def stored_dtype(self, name: str | None) -> torch.dtype | None:
        """Return what one tensor's stored dtypes promote to, or None for an unknown tensor."""
        for weight in self.weights():
            if weight.name == name:
                tensors = [self.load(model, weight, "cpu") for model in self.models]
                return promoted_dtype([tensor for tensor in tensors if tensor is not None])
        return None

    def survey(
        self,
        dtype: torch.dtype | None,
        device: Device,
        progress: bool,
        products: bool = False,
        mapper: Mapper = in_this_process,
    ) -> Survey:
        """Measure every task vector; see :func:`survey_checkpoints`."""
        tokenizers_agree.cache_clear()  # the files may have changed since the last survey
        measured: dict[str, _Measured] = {}
        left_out: list[str] = []
        tieable: list[WeightInfo] = []
        if not self.are_files:
            held = self.loader(self.base).index.tensor_paths
            warn_of_unread(self.base, self.weights(), held)
        weights = self._named_once()
        one = partial(self._measured, dtype=dtype, device=device, products=products)
        for weight, tensor in zip(weights, mapper(one, weights, progress), strict=True):
            if isinstance(tensor, DifferentVocabularyError):
                LOG.warning("%s; the tensor does not count towards the coefficients.", tensor)
                left_out.append(weight.name)
                continue
            if tensor is None:
                continue
            if self.are_files or weight.vocabulary_axis is not None or weight.tied_names:
                if any(
                    any(tensor.norms)
                    and tensor.norms == measured[other.name].norms
                    and self._equal(weight, other)
                    for other in tieable
                ):
                    continue  # tied, and stored twice
                tieable.append(weight)
            measured[weight.name] = tensor
        return Survey(
            self.experts,
            squared_norms={name: tensor.norms for name, tensor in measured.items()},
            dtypes={name: tensor.dtype for name, tensor in measured.items()},
            left_out=tuple(left_out),
            parameters=sum(tensor.size for tensor in measured.values()),
            products=sum_matrices([t.products for t in measured.values()]) if products else None,
        )

    def _named_once(self) -> list[WeightInfo]:
        """Return the weights without those that are stored as another one in every model."""
        weights: dict[tuple[str | None, ...], WeightInfo] = {}
        for weight in self.weights():
            names = tuple(self.stored_name(model, weight) for model in self.models)
            # Without a stored name it is computed from others, and is like no other.
            weights.setdefault((weight.name, None) if None in names else names, weight)
        return list(weights.values())

    def _measured(
        self, weight: WeightInfo, dtype: torch.dtype | None, device: Device, products: bool
    ) -> "_Measured | DifferentVocabularyError | None":
        """Measure one tensor, or return why it cannot be compared."""
        try:
            return self._measure(weight, dtype, device, products)
        except DifferentVocabularyError as difference:
            return difference

    def _measure(
        self, weight: WeightInfo, dtype: torch.dtype | None, device: Device, products: bool
    ) -> "_Measured | None":
        """Measure one tensor; None if it is no parameter of the base."""
        base = self.load(self.base, weight, device)
        if base is None and not weight.optional:
            raise ValueError(
                f"The base {self.base} lacks tensor {weight.name}, which its architecture "
                "calls for; download the checkpoint again."
            )
        if base is None or not base.is_floating_point():
            return None
        stored = [self._load_expert(model, weight, base, device) for model in self.experts]
        inputs = TensorInputs(weight.name, self.base, base, self.experts, tuple(stored))
        if dtype is not None:
            inputs = inputs.to(dtype)
        norms = inputs.squared_norms
        gram = inner_products(inputs.base, inputs.experts) if products else []
        return _Measured(norms, promoted_dtype([base, *stored]), base.numel(), gram)

    def _load_expert(
        self, model: ModelReference, weight: WeightInfo, base: Tensor, device: Device
    ) -> Tensor:
        expert = self.load(model, weight, device)
        if expert is None:
            raise ValueError(
                f"Expert {model} lacks tensor {weight.name}, which the base {self.base} "
                "holds; complete the checkpoint or leave the expert out of the merge."
            )
        if weight.vocabulary_axis is not None:
            compare_vocabularies(weight, (self.base, base), (model, expert))
        if expert.shape != base.shape:
            raise ValueError(
                f"Tensor {weight.name} has shape {list(expert.shape)} in expert {model} but "
                f"{list(base.shape)} in the base {self.base}; merge fine-tunes of one base."
            )
        return expert

    def _equal(self, weight: WeightInfo, other: WeightInfo) -> bool:
        """Return whether every model, the base included, stores the same tensor twice."""
        return all(
            torch.equal(first, second)
            for model in self.models
            if (first := self.load(model, weight, "cpu")) is not None
            and (second := self.load(model, other, "cpu")) is not None
        )


@dataclass(frozen=True)
class _Measured:
    """One tensor: squared norms per expert, stored dtype, elements, inner products."""

    norms: Norms
    dtype: torch.dtype
    size: int
    products: list[list[float]]


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
    """Read models anew from here on, in every thread."""
    mergekit_private.open_loaders.clear()
    tokenizers_agree.cache_clear()


def set_up_worker(options: MergeOptions) -> None:
    """Prepare a process that measures or merges for another one: the same loaders, files anew."""
    forget_files()
    LoaderCache().setup(options)


def survey_checkpoints(
    base: ModelReference | str,
    experts: Sequence[ModelReference | str],
    *,
    dtype: torch.dtype | None = None,
    device: Device = "cpu",
    progress: bool = True,
    products: bool = False,
) -> Survey:
    """Survey checkpoints on disk or on the Hugging Face hub.

    Args:
        base: θ_0; a path or hub name as MergeKit writes it (``model``, ``model@revision``,
            ``model+lora``), a ``ModelReference``, or one file of tensors.
        experts: θ_t, T of the same.
        dtype: what tensors are cast to before they are subtracted, as MergeKit's ``dtype``
            does; as stored when not given.
        device: where the arithmetic is done.
        progress: whether a progress bar is shown.
        products: whether inner products are measured too.

    Returns:
        The survey. Vocabulary tensors whose shapes or tokenizers differ are left out of it.

    Raises:
        ValueError: if an expert lacks a tensor of the base or holds another shape, or a
            tensor holds NaN or Inf; names the model and the tensor.
    """
    return Checkpoints.of(base, experts).survey(dtype, device, progress, products)
