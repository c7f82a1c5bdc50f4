"""A base and its experts, read with MergeKit's architectures and loaders."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import tqdm
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_metagpt import mergekit_private
from mergekit_metagpt.core.coefficients import Norms
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import inner_products, squared_norm
from mergekit_metagpt.measure.headers import Header, read_header, unread
from mergekit_metagpt.measure.identity import identity_of, on_hub, stat_of
from mergekit_metagpt.measure.loaders import HubLoader, forget_models, weight_files
from mergekit_metagpt.measure.survey import Measured, Survey
from mergekit_metagpt.measure.vocabularies import tokenizers_agree
from mergekit_metagpt.workers import Mapper, in_this_process

Device = torch.device | str


@dataclass(frozen=True)
class Checkpoints:
    """A base and its experts: model directories, or single files of tensors.

    MergeKit merges directories with ``mergekit-yaml``, and single files with ``mergekit-pytorch``.
    """

    base: ModelReference  # θ_0
    experts: tuple[ModelReference, ...]  # θ_t, in canonical order

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

    def forget_files(self) -> None:
        """Close the weight files, and forget which files the models have."""
        forget_models(self.models)

    def files(self) -> list[str]:
        """Return the paths of all weight files."""
        return [str(path) for model in self.models for path in weight_files(self.loader(model))]

    def identity(self, model: ModelReference) -> list[Any]:
        """Return what a model is: its files, or those of the model with its adapter applied.

        Its tokenizer counts, since it decides whether vocabularies agree.
        """
        loader = self.loader(model)
        if self.are_files:
            return identity_of(model.model.path)
        if isinstance(loader, HubLoader):
            identity: list[Any] = [model.model.path, loader.repository.commit]
        else:
            identity = identity_of(loader.index.base_path)
            if not on_hub(loader.index.base_path):  # an index may name files in folders below
                identity += [[str(path), stat_of(path)] for path in weight_files(loader)]
        if model.lora and os.path.isdir(model.model.path):
            identity += identity_of(model.model.path)
        return [*identity, LoaderCache().trust_remote_code]

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """The headers of the base's tensors, by name."""
        loader = self.loader(self.base)
        if isinstance(loader, HubLoader):
            return loader.headers
        held = [read_header(str(file), self.base) for file in weight_files(loader)]
        return {name: it for each in held for name, it in each.items()}

    @cached_property
    def weights(self) -> dict[str, WeightInfo]:
        """The parameters to compare by name, ordered so that each shard is opened once."""
        index = self.loader(self.base).index
        if self.are_files:
            # If a file lacks a tensor, mergekit-pytorch has stopped, unless it was told to go on.
            common = set(index.tensor_paths).intersection(
                *(self.loader(expert).index.tensor_paths for expert in self.experts)
            )
            weights = [WeightInfo(name=name) for name in index.tensor_paths if name in common]
        else:
            cache, models = LoaderCache(), [{"model": model} for model in self.models]
            config = MergeConfiguration.model_validate(
                {"merge_method": "metagpt", "base_model": self.base, "models": models}
            )
            options = MergeOptions(
                allow_crimes=True,  # the merge decides whether architectures may differ
                trust_remote_code=cache.trust_remote_code,
                transformers_cache=cache.hf_cache_dir,
                lazy_unpickle=cache.lazy_unpickle,
            )
            architecture = get_architecture_info(config, options)
            weights = architecture.all_weights(self.base.config(cache.trust_remote_code))

        def shard(weight: WeightInfo) -> str:
            return index.tensor_paths.get(self._stored_name(self.base, weight) or "", "")

        return {weight.name: weight for weight in sorted(weights, key=shard)}

    def unread(self) -> list[str]:
        """Return the weights of the base that MergeKit's own command loses without a word.

        ``mergekit-metagpt merge`` knows its plan, and refuses to lose weights. ``mergekit-yaml``
        shows its plan to no merge method, but a survey sees all tensors.
        """
        if self.are_files:
            return []  # mergekit-pytorch takes every tensor
        read = set[str]()
        for weight in self.weights.values():
            names = {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
            if names.isdisjoint(self.headers) and not weight.optional:
                return []  # MergeKit makes it from others, and a survey cannot tell which
            read |= names
        config = self.base.config(LoaderCache().trust_remote_code)
        architecture = next(iter(config.architectures or []), "")
        return sorted(unread(self.headers, read, architecture, self.is_tied))

    @property
    def is_tied(self) -> bool:
        """Whether the head may be the embeddings; a config says so, but single files have none."""
        if self.are_files:
            return True
        config = self.base.config(LoaderCache().trust_remote_code)
        return bool(getattr(config, "tie_word_embeddings", False))

    def _stored_name(self, model: ModelReference, weight: WeightInfo) -> str | None:
        # Its own name, an alias, or the name of a weight tied to it; None if the model lacks it.
        held = self.loader(model).index.tensor_paths
        names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        return next((name for name in names if name in held), None)

    def load(self, model: ModelReference, weight: WeightInfo, device: Device) -> Tensor | None:
        """Return a weight as it is stored, or None if the model lacks it."""
        if self.are_files:
            return self.loader(model).get_tensor(weight.name, device=str(device))
        return LoadTensor(
            model=model,
            tensor=weight.name,
            dtype=weight.force_dtype,
            device=str(device),
            optional=True,
            aliases=weight.aliases,
            tied_names=weight.tied_names,
        ).execute()

    def survey(
        self,
        device: Device = "cpu",
        progress: bool = True,
        products: bool = False,
        mapper: Mapper = in_this_process,
    ) -> Survey:
        """Measure every task vector as it is stored.

        Vocabulary tensors are left out if their shapes or tokenizers differ. With ``products``,
        inner products are measured too; ``mapper`` says where, in this process or on a cluster.

        Raises:
            ValueError: if an expert lacks a tensor of the base or has it in a different shape, or
                if a tensor holds NaN or Inf. The message names the model and the tensor.
        """
        tokenizers_agree.cache_clear()  # the files may have changed since the last survey
        # Open files are mapped into memory. While the merge holds a tensor of a file, all pages
        # that are read through the same mapping stay in memory. So the survey opens the files
        # again: its own mappings are freed one by one.
        for model in self.models:
            self.loader(model).flush()  # type: ignore[no-untyped-call]
        weights, tied = self._named_once()
        measured: dict[str, Measured] = {}
        left_out: dict[str, str] = {}
        tieable: dict[Norms, list[WeightInfo]] = {}
        bar = tqdm.tqdm(
            mapper(partial(self.measure, device, products), weights),
            "Measuring task vectors",
            len(weights),
            unit="tensor",
            disable=not progress,
        )
        for weight, tensor in zip(weights, bar, strict=True):
            if isinstance(tensor, str):
                left_out[weight.name] = tensor
                continue
            if tensor is None:
                continue
            # Tensors that no expert moved may be equal by chance, such as norms.
            if any(tensor.norms) and (
                self.are_files or weight.vocabulary_axis is not None or weight.tied_names
            ):
                alike = tieable.setdefault(tensor.norms, [])
                twin = next((other for other in alike if self.are_equal(weight, other)), None)
                if twin is not None:  # tied, and stored twice
                    tied[weight.name] = twin.name
                    continue
                alike.append(weight)
            measured[weight.name] = tensor
        return Survey(self.experts, measured, tied, left_out)

    def measure(self, device: Device, products: bool, weight: WeightInfo) -> Measured | str | None:
        """Measure one tensor of the models, in any process.

        Returns:
            The reason if vocabularies differ; None if the base has no such floating-point tensor.
        """
        base = self.load(self.base, weight, device)
        if base is None and not weight.optional:
            raise ValueError(
                f"The base {self.base} lacks tensor {weight.name}, which its architecture "
                "requires; download the checkpoint again."
            )
        if base is None or not base.is_floating_point():
            return None
        experts = []
        for model in self.experts:
            expert = self.load(model, weight, device)
            if expert is None:
                raise ValueError(
                    f"Expert {model} lacks tensor {weight.name}, which the base {self.base} "
                    "holds; complete the checkpoint or leave the expert out of the merge."
                )
            alike = expert.shape == base.shape
            if weight.vocabulary_axis is not None:
                if not alike:
                    return (
                        f"Vocabulary tensor {weight.name} has shape {list(expert.shape)} in "
                        f"{model} but {list(base.shape)} in {self.base}"
                    )
                cache = LoaderCache()
                known = cache.hf_cache_dir, cache.trust_remote_code
                if not tokenizers_agree(self.base, model, *known):
                    return (
                        f"The tokenizers of {model} and {self.base} give the rows of "
                        f"{weight.name} different meanings"
                    )
            elif not alike:
                raise ValueError(
                    f"Tensor {weight.name} has shape {list(expert.shape)} in expert {model} but "
                    f"{list(base.shape)} in the base {self.base}; merge fine-tunes of one base."
                )
            experts.append(expert)
        inputs = TensorInputs(weight.name, self.base, base, self.experts, tuple(experts))
        measured = Measured.of(inputs)
        if not products:
            return measured
        return replace(measured, products=inner_products(base, experts), base=squared_norm(base))

    def _named_once(self) -> tuple[list[WeightInfo], dict[str, str]]:
        """Return each stored weight once, and a map from every tied name to that weight's name."""
        weights: dict[tuple[str | None, ...], WeightInfo] = {}
        tied: dict[str, str] = {}
        for weight in self.weights.values():
            names = tuple(self._stored_name(model, weight) for model in self.models)
            # A weight without a stored name is computed from others, so it is tied to none.
            first = weights.setdefault((weight.name, None) if None in names else names, weight)
            if first is not weight:
                tied[weight.name] = first.name
        return list(weights.values()), tied

    def are_equal(self, weight: WeightInfo, other: WeightInfo) -> bool:
        """Return whether two weights are the same in each model that has both."""
        for model in self.models:
            name, its = self._stored_name(model, weight), self._stored_name(model, other)
            if name == its is not None:  # tied: nothing to read
                continue
            first, second = (self.load(model, it, "cpu") for it in (weight, other))
            if not (first is None or second is None or torch.equal(first, second)):
                return False
        return True
