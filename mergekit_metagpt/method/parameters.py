"""The parameters that a merge config may set, and their valid values."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# A submodule: at registration the package `mergekit.merge_methods` is half imported.
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import ValidationError

from mergekit_metagpt.granularities import GRANULARITIES
from mergekit_metagpt.wording import one_of


@dataclass(frozen=True)
class _Checked(ParameterSpec):
    """A parameter that refuses bad values with one sentence, when the merge is planned."""

    wanted: str = ""
    accepts: Callable[[Any], bool] = bool

    def validate(self, value: Any) -> Any:
        try:
            parsed = super().validate(value)
        except ValidationError:
            parsed = None
        if parsed is None or not self.accepts(parsed):
            raise ValueError(
                f"Parameter {self.name} must be {self.wanted}, not {value!r}; correct it in the "
                "merge config."
            )
        return parsed


_SHARE = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
_POSITIVE = ("a finite number of at least 0", lambda x: 0 <= x < math.inf)

# The stock methods accept any value here, and may then produce NaN or just the base.
RULES = {
    "weight": _POSITIVE,
    "lambda": ("a finite number", math.isfinite),
    "density": _SHARE,
    "gamma": _SHARE,
    "epsilon": _SHARE,
}
_DEFAULTS = {"weight": 1.0}

_OWN_PARAMETERS = (
    _Checked(
        "granularity",
        str,
        ParameterScope.SHARED,
        default="tensor",
        description="Which tensors share coefficients",
        wanted=one_of(GRANULARITIES),
        accepts=GRANULARITIES.__contains__,
    ),
    _Checked(
        "exponent",
        float,
        ParameterScope.SHARED,
        default=2.0,
        description="k in λ ∝ ‖τ‖^k: 2 is MetaGPT, 0 the plain average",
        wanted=_POSITIVE[0],
        accepts=_POSITIVE[1],
    ),
)


def with_priors(stock: Iterable[ParameterSpec]) -> tuple[ParameterSpec, ...]:
    """Return a stock method's parameters, with priors as weights, and this package's own."""
    return (*map(_checked, stock), *_OWN_PARAMETERS)


def _checked(parameter: ParameterSpec) -> ParameterSpec:
    if parameter.name not in RULES:
        return parameter
    wanted, accepts = RULES[parameter.name]
    return _Checked(
        parameter.name,
        parameter.value_type,
        parameter.scope,
        default=_DEFAULTS.get(parameter.name, parameter.default),
        description=parameter.description,
        wanted=wanted,
        accepts=accepts,
    )
