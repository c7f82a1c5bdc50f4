"""The parameters that a merge config may set, and their valid values."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

# A submodule: at registration the package `mergekit.merge_methods` is half imported.
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import ValidationError

from mergekit_metagpt.core.granularities import GRANULARITIES
from mergekit_metagpt.wording import one_of


@dataclass(frozen=True)
class _Checked(ParameterSpec):
    """A parameter that refuses bad values with one sentence, when the merge is planned."""

    wanted: str = ""
    accepts: Callable[[Any], bool] = bool
    way_out: str = "correct it in the merge config"

    def validate(self, value: Any) -> Any:
        if value is None and self.default is None:
            return None
        try:
            parsed = super().validate(value)
        except ValidationError:
            parsed = None
        if parsed is None or not self.accepts(parsed):
            raise ValueError(
                f"Parameter {self.name} must be {self.wanted}, not {value!r}; {self.way_out}."
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

_EXPONENT = _Checked(
    "exponent",
    float,
    ParameterScope.SHARED,
    default=None,  # that of the granularity
    description="k in λ ∝ ‖τ‖^k: 2 is MetaGPT, 0 the plain average",
    wanted=_POSITIVE[0],
    accepts=_POSITIVE[1],
)


def exponent_of(parameters: Mapping[str, Any]) -> float:
    """Return k in λ_t ∝ w_t ‖τ_t‖^k: the config's, or that of its granularity."""
    exponent = parameters["exponent"]
    if exponent is None:
        return GRANULARITIES[parameters["granularity"]].default_exponent
    return float(exponent)


@cache
def with_priors(stock: tuple[ParameterSpec, ...], is_plain: bool) -> tuple[ParameterSpec, ...]:
    """Return a stock method's parameters, with priors as weights, and this package's own.

    Only the plain method has a coefficient for every direction; the others weigh whole task
    vectors.
    """
    names = [name for name, g in GRANULARITIES.items() if is_plain or not g.by_direction]
    granularity = _Checked(
        "granularity",
        str,
        ParameterScope.SHARED,
        default="tensor",
        description="Which tensors share coefficients",
        wanted=one_of(names),
        accepts=names.__contains__,
        way_out=_Checked.way_out + "; direction needs merge_method: metagpt" * (not is_plain),
    )
    return (*map(_checked, stock), granularity, _EXPONENT)


def _checked(parameter: ParameterSpec) -> ParameterSpec:
    if parameter.name not in RULES:
        return parameter
    wanted, accepts = RULES[parameter.name]
    return _Checked(
        parameter.name,
        parameter.value_type,
        parameter.scope,
        default=1.0 if parameter.name == "weight" else parameter.default,
        description=parameter.description,
        wanted=wanted,
        accepts=accepts,
    )
