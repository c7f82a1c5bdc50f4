"""A job: one merge, plan or survey, made once from a config and options.

MergeKit keeps its loaders, and torch its random numbers and threads, once per process. So jobs
run one at a time, each with loaders of its own, and leave the process as they found it.
"""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any

import numpy
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_metagpt.measure.identity import digest, identity_of
from mergekit_metagpt.measure.loaders import forget_models
from mergekit_metagpt.measure.locations import Repository, locate
from mergekit_metagpt.method.summary import Entry
from mergekit_metagpt.names import canonical
from mergekit_metagpt.planning.config import ConfigFile, base_and_experts
from mergekit_metagpt.planning.models import ModelFiles, find_model_files
from mergekit_metagpt.planning.outputs import Outputs, plan_outputs
from mergekit_metagpt.wording import BadInputError

_ONE_AT_A_TIME = RLock()


@dataclass
class Job:
    """A config and options, read once, and what comes of them."""

    config: ConfigFile
    options: MergeOptions  # adapters are applied in a directory that belongs to their files
    entries: list[Entry] = field(default_factory=list)  # of each tensor, merged by this job

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown: on a terminal, and in a notebook."""
        return not self.options.quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)

    @cached_property
    def parsed(self) -> MergeConfiguration:
        """The config as MergeKit reads it, or a BadInputError that says why it cannot."""
        return self.config.parse()

    @cached_property
    def base_and_experts(self) -> tuple[ModelReference, list[ModelReference]]:
        """The base, and the experts in canonical order, or a BadInputError."""
        return base_and_experts(self.parsed)

    @cached_property
    def models(self) -> dict[ModelReference, ModelFiles]:
        """The models that the config names, the base first."""
        models = self.parsed.referenced_models()
        return {model: find_model_files(model, self.options) for model in models}

    @cached_property
    def outputs(self) -> Outputs:
        """What will be written, or a BadInputError."""
        return plan_outputs(self.parsed, self.options, self.models, self.config.name)


@contextmanager
def running(config: ConfigFile, options: MergeOptions) -> Iterator[Job]:
    """Run a job. Another thread's job waits until it ends.

    Raises:
        BadInputError: if MergeKit cannot read the config.
    """
    with alone():
        job = Job(config, options)
        job.options = with_own_adapters(options, job.parsed)
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        forget_models(job.parsed.referenced_models())
        LoaderCache().setup(job.options)
        try:
            yield job
        finally:
            forget_models(job.parsed.referenced_models())


@contextmanager
def alone() -> Iterator[None]:
    """Wait for other jobs; at the end, give the caller back its random numbers and threads."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        threads, loading = torch.get_num_threads(), LoaderCache()
        states, settings = (random.getstate(), numpy.random.get_state()), dict(vars(loading))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            vars(loading).clear()
            vars(loading).update(settings)


def with_own_adapters(options: MergeOptions, config: MergeConfiguration) -> MergeOptions:
    """Return options whose LoRA cache belongs to the adapters and bases as they are now.

    MergeKit names the entries of this cache after the paths of the models. So it would reuse
    an old entry for an adapter that was trained again, or for another project's ``./lora``.
    The returned options therefore use a subdirectory of the cache, named after what the models
    are. Options that use it already stay as they are.
    """
    adapted = [model for model in canonical(config.referenced_models()) if model.lora]
    if not (options.lora_merge_cache and adapted):
        return options
    identity: list[Any] = []
    for path in (path for model in adapted for path in (model.model, model.lora) if path):
        identity.append(str(path))
        with suppress(BadInputError):  # the preflight says why
            place = locate(path, options)
            identity += [place.commit] if isinstance(place, Repository) else identity_of(place.path)
    key = digest(options.lora_merge_dtype, identity)[:16]
    if os.path.basename(options.lora_merge_cache) == key:
        return options
    cache = os.path.join(options.lora_merge_cache, key)
    return options.model_copy(update={"lora_merge_cache": cache})
