"""The coefficients that a merge uses for each tensor, and their summary.

The forecast of a merge and the entries of a finished one both become a :class:`Summary`.
Tables, figures, ``--json``, records, cards and warnings are all made from it, so they agree.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import mul
from typing import Any

from mergekit_metagpt.core.coefficients import Norms, scaling_coefficients
from mergekit_metagpt.core.directions import Directions
from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.method.parameters import exponent_of
from mergekit_metagpt.names import canonical, grouped, layer_of


@dataclass(frozen=True)
class Entry:
    """How one tensor is merged.

    Attributes:
        tensor: its name.
        granularity: the scope of ``squared_norms``.
        experts: T model ids, in canonical order.
        squared_norms: ‖τ_t‖² over that scope, T floats.
        priors: w_t, T floats.
        exponent: k in λ_t ∝ w_t ‖τ_t‖^k.
        size: how many elements the tensor has.
        directions: what the tensor comes to, if every direction has a coefficient.
    """

    tensor: str | None
    granularity: str
    experts: tuple[Hashable, ...]
    squared_norms: Norms
    priors: Norms
    exponent: float
    size: int
    directions: Directions | None = None

    @classmethod
    def of(
        cls,
        tensor: str | None,
        experts: tuple[Hashable, ...],
        squared_norms: Norms,
        size: int,
        parameters: Mapping[str, Any],
        directions: Directions | None = None,
    ) -> "Entry":
        """Return the entry of a tensor that is merged with the method's parameters."""
        granularity, exponent = parameters["granularity"], exponent_of(parameters)
        priors = tuple(parameters["weight"][expert] for expert in experts)
        return cls(tensor, granularity, experts, squared_norms, priors, exponent, size, directions)

    def changed(self, exponent: float | None, priors: Mapping[Any, float]) -> "Entry":
        """Return the entry for another exponent, unless it is None, and priors of some experts."""
        own = zip(self.experts, self.priors, strict=True)
        chosen = tuple(priors.get(expert, prior) for expert, prior in own)
        exponent = self.exponent if exponent is None else exponent
        return replace(self, exponent=exponent, priors=chosen)

    @cached_property
    def coefficients(self) -> Norms:
        """λ_t, T floats; of directions, how much of each task vector is in the merge."""
        if self.directions:
            return self.directions.kept
        return tuple(scaling_coefficients(self.squared_norms, self.priors, self.exponent))

    @cached_property
    def norms(self) -> dict[Hashable, float]:
        """``squared_norms`` by expert."""
        return dict(zip(self.experts, self.squared_norms, strict=True))

    @property
    def scope(self) -> str:
        """The name of the scope that the norms were measured over."""
        return GRANULARITIES[self.granularity].scope(self.tensor or "")

    def row(self, experts: Iterable[Hashable]) -> Norms:
        """Return the coefficients of some experts; 0 for those without the tensor."""
        known = dict(zip(self.experts, self.coefficients, strict=True))
        return tuple(known.get(expert, 0.0) for expert in experts)


@dataclass(frozen=True)
class Expert:
    """The norm and the coefficients of one expert in a merge.

    Attributes:
        squared_norm: ‖τ‖² over everything that was measured for the merge.
        mean: its coefficient, averaged over the parameters of the merge; of directions, ``kept``.
        least: its least coefficient in any tensor.
        largest: its largest one.
        kept: how much of its task vector is in the merge; None if that is not known.
    """

    model: Hashable
    squared_norm: float
    mean: float
    least: float
    largest: float
    kept: float | None = None

    @property
    def norm(self) -> float:
        """‖τ‖."""
        return math.sqrt(self.squared_norm)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "model": str(self.model),
            "norm": self.norm,
            "squared_norm": self.squared_norm,
            "coefficient": self.mean,
            "least": self.least,
            "largest": self.largest,
            "kept": self.kept,
        }


class Summary:
    """A summary of the coefficients of a whole merge.

    Attributes:
        entries: how each tensor is merged, ordered by name.
        ids: all T experts, in canonical order.
    """

    def __init__(self, entries: Iterable[Entry], kept: Sequence[float] | None = None) -> None:
        """Summarize entries; ``kept``, in canonical order, is for where they do not say it."""
        self.entries = sorted(entries, key=lambda entry: entry.tensor or "")
        self.ids = canonical({expert for entry in self.entries for expert in entry.experts})
        self._given: Sequence[float | None] = kept or [None] * len(self.ids)

    @property
    def parameters(self) -> int:
        """How many numbers are merged."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def granularities(self) -> list[str]:
        """The scopes of the coefficients: one, unless slices differ."""
        return sorted({entry.granularity for entry in self.entries})

    @property
    def granularity(self) -> str:
        """The same in words."""
        return " and ".join(self.granularities)

    @property
    def exponent(self) -> str:
        """K in λ ∝ w ‖τ‖^k, in words: one, unless slices differ."""
        return " and ".join(f"{k:g}" for k in sorted({entry.exponent for entry in self.entries}))

    @cached_property
    def experts(self) -> list[Expert]:
        """All T experts."""
        inside = self._kept(self.entries)
        means = inside or self._means(self.entries)
        figures = zip(self.ids, means, inside or self._given, strict=True)
        return [
            Expert(id_, self._squared_norm(id_), mean, *self._range(id_), kept)
            for id_, mean, kept in figures
        ]

    def _squared_norm(self, expert: Hashable) -> float:
        """Return ‖τ‖²; each scope counts once, by the first of its tensors."""
        moved = [entry for entry in reversed(self.entries) if expert in entry.norms]
        return math.fsum({entry.scope: entry.norms[expert] for entry in moved}.values())

    def _range(self, expert: Hashable) -> tuple[float, float]:
        """Return an expert's least and largest coefficient; of directions, where it moves."""
        moved = [it for it in self.entries if not it.directions or it.norms.get(expert) != 0]
        coefficients = [entry.row([expert])[0] for entry in moved]
        return min(coefficients, default=0.0), max(coefficients, default=0.0)

    @property
    def by_direction(self) -> bool:
        """Whether any tensor has a coefficient for every direction."""
        return any(entry.directions for entry in self.entries)

    @property
    def varies(self) -> bool:
        """Whether tensors have different coefficients."""
        return any(expert.least != expert.largest for expert in self.experts)

    @cached_property
    def layers(self) -> list[list[float]]:
        """For each layer, first to last, T coefficients, averaged over its parameters."""
        return [self._means(entries) for entries in self._by_layer]

    @cached_property
    def kept_by_layer(self) -> list[list[float]]:
        """For each layer, how much of each task vector is in the merge; empty if not measured."""
        return [kept for entries in self._by_layer if (kept := self._kept(entries))]

    @cached_property
    def stretch(self) -> float | None:
        """How long the merged task vector is, relative to a sum of experts at right angles."""
        moved = [entry for entry in self.entries if any(entry.squared_norms)]
        lengths = [entry.directions.squared_norm for entry in moved if entry.directions]
        if not moved or len(lengths) < len(moved):
            return None
        return math.sqrt(math.fsum(lengths) / sum(math.fsum(e.squared_norms) for e in moved))

    @cached_property
    def decided(self) -> tuple[int, int] | None:
        """In how many directions of the matrices the coefficients decide, and of how many."""
        directions = [entry.directions for entry in self.entries if entry.directions]
        matrices = [(it.decided, it.inputs) for it in directions if it.decided is not None]
        if not matrices:
            return None
        return sum(decided for decided, _ in matrices), sum(inputs for _, inputs in matrices)

    @cached_property
    def _by_layer(self) -> list[list[Entry]]:
        def in_order(layer: str) -> tuple[str, int]:
            stack, _, number = layer.rpartition(".")
            return stack, int(number)

        members = grouped((layer, e) for e in self.entries if (layer := layer_of(e.tensor)))
        return [members[layer] for layer in sorted(members, key=in_order)]

    @cached_property
    def scopes(self) -> dict[str, list[Entry]]:
        """The tensors of each scope, by its name; one by one where priors vary within it."""
        scopes: dict[str, list[Entry]] = {}
        for scope, entries in grouped((entry.scope, entry) for entry in self.entries).items():
            if len({(entry.experts, entry.coefficients) for entry in entries}) == 1:
                scopes[scope] = entries
            else:
                scopes |= {entry.tensor or "": [entry] for entry in entries}
        return scopes

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON types; an expert without a scope's tensors has norm null."""

        def scope(first: Entry, *others: Entry) -> dict[str, Any]:
            return {
                "norms_of": first.scope,
                "parameters": sum(entry.size for entry in (first, *others)),
                "squared_norms": [first.norms.get(expert) for expert in self.ids],
                "coefficients": list(first.row(self.ids)),
            }

        return {
            "granularity": self.granularities,
            "tensors": len(self.entries),
            "parameters": self.parameters,
            "stretch": self.stretch,
            "decided": self.decided and list(self.decided),
            "experts": [expert.as_json() for expert in self.experts],
            "coefficients": {name: scope(*entries) for name, entries in self.scopes.items()},
        }

    def _kept(self, entries: Sequence[Entry]) -> list[float] | None:
        """Return how much of each task vector is in the merge, T floats, if it was measured."""
        moved = [entry for entry in entries if any(entry.squared_norms)]
        if not moved or not all(entry.directions for entry in moved):
            return None
        norms, inside = dict.fromkeys(self.ids, 0.0), dict.fromkeys(self.ids, 0.0)
        for entry in moved:
            for expert, norm, kept in zip(
                entry.experts, entry.squared_norms, entry.coefficients, strict=True
            ):
                norms[expert] += norm
                inside[expert] += norm * kept
        return [inside[it] / norms[it] if norms[it] else 0.0 for it in self.ids]

    def _means(self, entries: Sequence[Entry]) -> list[float]:
        rows, sizes = [entry.row(self.ids) for entry in entries], [entry.size for entry in entries]
        if len(set(rows)) == 1:
            return list(rows[0])  # exactly; a mean would round
        sums = (math.fsum(map(mul, sizes, column)) for column in zip(*rows, strict=True))
        return [one / sum(sizes) for one in sums]
