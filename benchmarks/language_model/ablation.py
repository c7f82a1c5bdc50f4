"""Which choices of `granularity: direction` matter: variants of it, on validation examples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks.fitting import IGNORED, answer_loss
from benchmarks.harness_tasks import Example
from benchmarks.language_model.base import fast_products, load
from benchmarks.language_model.experts import encoded
from benchmarks.language_model.measure import FamilyBench
from benchmarks.language_model.rows import ARITHMETIC, AVERAGE
from benchmarks.language_model.rules import is_matrix, matrices
from benchmarks.language_model.variants import Look, Variant
from benchmarks.tables import table
from mergekit_metagpt.core.roles import Role, is_table

_BATCH = 16
DEFAULT = "direction"
# Each is one change away from the default.
VARIANTS = {
    DEFAULT: Variant(),
    "power 0.5": Variant(power=0.5),
    "power 1": Variant(power=1.0),
    "no limit": Variant(farther=None),
    "limit 0": Variant(farther=0.0),
    "beyond the limit, symmetric": Variant(symmetric=True),
    "elsewhere the sum": Variant(elsewhere="sum"),
    "elsewhere the sum/√T": Variant(elsewhere="sum/√T"),
    "elsewhere the mean": Variant(elsewhere="mean"),
    "exponent 2": Variant(exponent=2.0),
    "tied embeddings by row": Variant(rows="tables"),
    "tables and vectors added up, but shared": Variant(rows="shared"),
    "tables and vectors, the sum": Variant(rows="sum"),
    "rank 16": Variant(rank=16),
    "rank 32": Variant(rank=32),
    "two passes": Variant(passes=2),
    "all rows seen": Variant(of_rows=1),
}


class _Part(NamedTuple):
    """A matrix, or the rows of a tensor that is none.

    Attributes:
        name: the name of its tensor.
        role: what it does in its model.
        target: a view of the model's weights, m x n.
        base: the base's, m x n.
        taus: τ_t of the experts that move it, at most T x m x n.
    """

    name: str
    role: Role
    target: Tensor
    base: Tensor
    taus: Tensor


class Ablation:
    """The losses of all variants for one family; each is kept in the work directory."""

    def __init__(self, family: FamilyBench) -> None:
        self._family, self._bench = family, family.bench
        self._looked: tuple[int, ...] | None = None
        self._looks: list[Look | None] = []

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Return the mean loss over the tasks, by variant and for two rows without data."""
        sums = {AVERAGE.name: 1 / len(self._family.tasks), ARITHMETIC.name: 0.3}
        return {
            **{name: self._kept(name, c, partial(self._add_up, c)) for name, c in sums.items()},
            **{
                name: self._kept(name, asdict(variant), partial(self._vary, variant))
                for name, variant in VARIANTS.items()
            },
        }

    def _kept(self, name: str, settings: object, merge: Callable[[], None]) -> float:
        def measure() -> dict[str, dict[str, float]]:
            merge()
            return {name: {"loss": self._loss()}}

        path = f"{self._family.name}/ablation/{name.replace('/', ' by ')}"
        return self._bench.kept(path, settings, measure)[name]["loss"]

    def _add_up(self, coefficient: float) -> None:
        for part in self._parts:
            part.target.copy_(part.base + coefficient * part.taus.sum(0))

    def _vary(self, variant: Variant) -> None:
        self._look(variant)
        for part, look in zip(self._parts, self._looks, strict=True):
            merged = variant.merge(look) if look else variant.merge_rows(part.taus)
            part.target.copy_(part.base + merged)

    def _look(self, variant: Variant) -> None:
        """Look at all matrices, unless the last variant looked in the same way."""
        way = (variant.rank, variant.of_rows, variant.passes, variant.rows == "bound")
        if self._looked != way:
            self._looked = way
            self._looks = [
                variant.look(part.taus, part.name) if self._has_inputs(part, variant) else None
                for part in self._parts
            ]

    def _has_inputs(self, part: _Part, variant: Variant) -> bool:
        return is_matrix(part.role) and (variant.rows == "bound" or not is_table(part.name))

    @cached_property
    def _model(self) -> transformers.PreTrainedModel:
        return load(self._family.base).to(self._bench.device)  # type: ignore[arg-type, no-any-return]

    @cached_property
    def _parts(self) -> list[_Part]:
        """All that an expert moves."""
        return list(self._read())

    def _read(self) -> Iterator[_Part]:
        weights = self._model.state_dict()
        for name, role, base, taus in self._family.task_vectors():
            views = (matrices(tensor, role) for tensor in (weights[name], base, *taus))
            for target, start, *moved in zip(*views, strict=True):
                movers = [tau for tau in moved if tau.any()]
                if movers:
                    there = (start.to(target), torch.stack(movers).to(target))
                    yield _Part(name, role, target, *there)

    def _loss(self) -> float:
        splits = self._bench.splits
        return fmean(self._task_loss(splits[task].validation) for task in self._family.tasks)

    def _task_loss(self, examples: list[Example]) -> float:
        """Return the negative log-likelihood of an answer, in nats, as a mean over examples."""
        examples = sorted(examples, key=lambda example: len(example.prompt))
        total = 0.0
        for first in range(0, len(examples), _BATCH):
            batch = encoded(self._tokenizer, examples[first : first + _BATCH], self._model.device)
            with fast_products(self._bench.device):
                loss = answer_loss(self._model, **batch)  # the mean over tokens
            total += float(loss * (batch["labels"] != IGNORED).sum())
        return total / len(examples)

    @cached_property
    def _tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        return transformers.AutoTokenizer.from_pretrained(self._family.base)


def ablation_table(losses: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    """Return a table of regrets: how far a row's loss is above the least of its family.

    Args:
        losses: by recipe and seed, then by row.
    """
    least = {family: min(rows.values()) for family, rows in losses.items()}
    recipes = list(dict.fromkeys(recipe for recipe, _ in losses))
    seeds = sorted({seed for _, seed in losses})
    names = list(next(iter(losses.values())))

    def regret(name: str, recipe: str, seed: int) -> float:
        return losses[recipe, seed][name] - least[recipe, seed]

    def worst(name: str, seed: int) -> float:
        return max(regret(name, recipe, it) for recipe, it in losses if it == seed)

    def cells(name: str) -> Iterator[str]:
        yield name
        for recipe in recipes:
            measured = (seed for seed in seeds if (recipe, seed) in losses)
            yield " · ".join(f"{regret(name, recipe, seed):.3f}" for seed in measured)
        for seed in seeds:
            figure = f"{worst(name, seed):.3f}"
            is_least = worst(name, seed) == min(worst(other, seed) for other in names)
            yield f"**{figure}**" if is_least else figure

    header = ["regret", *recipes, *(f"worst, seed {seed}" for seed in seeds)]
    return table(header, map(cells, names))
