"""The formula of the paper in plain float64 numpy, independent of the package."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

Weights = Mapping[str, torch.Tensor]


def fine_tunes(
    shape: tuple[int, ...], dtype: torch.dtype, scales: Sequence[float], seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base of random numbers, and an expert for each scale of a task vector."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = noise()
    return base.to(dtype), [(base + scale * noise()).to(dtype) for scale in scales]


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def squared_norms(base: Weights, experts: list[Weights]) -> dict[str, np.ndarray]:
    return {
        name: np.array([((as_float64(e[name]) - as_float64(tensor)) ** 2).sum() for e in experts])
        for name, tensor in base.items()
    }


def scope(name: str, granularity: str) -> str:
    if granularity == "model":
        return "model"
    layer = re.match(r"(.*?(?:^|\.)\d+)\.", name)
    return layer.group(1) if granularity == "layer" and layer else name


def coefficients(
    base: Weights,
    experts: list[Weights],
    granularity: str = "tensor",
    priors: list[float] | None = None,
    exponent: float = 2.0,
) -> dict[str, np.ndarray]:
    """λ_t = w_t ‖τ_t‖^k / Σ_j w_j ‖τ_j‖^k over the tensors of a scope, by tensor."""
    norms = squared_norms(base, experts)
    totals: dict[str, np.ndarray] = {}
    for name, row in norms.items():
        key = scope(name, granularity)
        totals[key] = totals.get(key, 0.0) + row
    result = {}
    for name in base:
        total = totals[scope(name, granularity)]
        moved = np.where(total > 0, total ** (exponent / 2), 0.0)  # at k = 0 too
        shares = np.array(priors or [1.0] * len(experts)) * moved
        result[name] = shares / shares.sum() if shares.any() else shares
    return result


def merged(
    base: Weights, experts: list[Weights], by_tensor: Mapping[str, np.ndarray], scale: float = 1.0
) -> dict[str, np.ndarray]:
    result = {}
    for name, tensor in base.items():
        origin = as_float64(tensor)
        result[name] = origin + scale * sum(
            c * (as_float64(e[name]) - origin)
            for c, e in zip(by_tensor[name], experts, strict=True)
        )
    return result


# Bits of the significand, and the exponent of the least subnormal number.
_FORMATS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}


def rounding_step(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance to the next number of a format, float64."""
    if dtype == torch.float64:
        return np.spacing(abs(values))
    bits, least = _FORMATS[dtype]
    with np.errstate(divide="ignore"):
        exponents = np.floor(np.log2(abs(values)))
    return np.exp2(np.maximum(exponents + 1 - bits, least))


def assert_merged(
    actual: Weights,
    base: Weights,
    experts: list[Weights],
    by_tensor: Mapping[str, np.ndarray],
    scale: float = 1.0,
    tolerance: float = 1e-6,
) -> None:
    """One rounding step of the output dtype, a few float32 steps of the largest value added,
    and what the tolerance in the coefficients moves."""
    expected = merged(base, experts, by_tensor, scale)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        origin = as_float64(base[name])
        deltas = [as_float64(e[name]) - origin for e in experts]
        weighted = [abs(scale * c * d) for c, d in zip(by_tensor[name], deltas, strict=True)]
        step = rounding_step(expected[name], tensor.dtype)
        working = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        cancelled = rounding_step(np.maximum.reduce([abs(origin), *weighted]), working)
        allowed = step + (2 + len(experts)) * cancelled + tolerance * sum(weighted)
        assert (abs(as_float64(tensor) - expected[name]) <= allowed).all(), name


def by_role(
    taus: list[np.ndarray], role: str, priors: list[float], exponent: float = 0.0
) -> np.ndarray:
    """M of granularity direction; needs that Q holds all that the experts move."""
    if role == "TRANSPOSED":
        turned = [tau.swapaxes(-1, -2) for tau in taus]
        return by_role(turned, "LINEAR", priors, exponent).swapaxes(-1, -2)
    if role == "LINEAR" and taus[0].ndim > 2:  # matrix by matrix
        return np.stack([by_role(its, role, priors, exponent) for its in zip(*taus, strict=True)])
    weights = np.array(priors) / max(priors)
    moving = [t for t, tau in enumerate(taus) if weights[t] and tau.any()]
    weights, moved = weights[moving], [taus[t] for t in moving]
    if len(moved) < 2:  # an expert alone is added whole
        return sum((w * tau for w, tau in zip(weights, moved, strict=True)), 0 * taus[0])
    if role == "LINEAR":
        return by_directions(moved, weights, exponent)
    axes = () if role == "ELEMENTS" else tuple(range(1, taus[0].ndim))
    energies = [
        w * np.linalg.norm(tau) ** (exponent - 2) * (tau**2).sum(axes, keepdims=True)
        for w, tau in zip(weights, moved, strict=True)
    ]
    total = np.maximum(sum(energies), 1e-300)
    parts = zip(weights, energies, moved, strict=True)
    return sum(w * energy / total * tau for w, energy, tau in parts)


def by_directions(taus: list[np.ndarray], weights: np.ndarray, exponent: float) -> np.ndarray:
    norms = np.array([(tau**2).sum() for tau in taus])
    shares = weights * norms ** (exponent / 2)
    shares /= shares.sum()
    energies = [s * tau.T @ tau / q for s, tau, q in zip(shares, taus, norms, strict=True)]
    values, vectors = np.linalg.eigh(sum(energies))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    weighed = values**0.75
    count = max(1, round(weighed.sum() ** 2 / (weighed**2).sum()))
    while True:
        v = vectors[:, :count]
        parts = zip(weights, taus, energies, strict=True)
        decided = sum(w * tau @ v @ (v.T @ e @ v) / values[:count] for w, tau, e in parts)
        moved = sum(((tau @ v) ** 2).sum() for tau in taus)
        if count == 1 or (decided**2).sum() - moved <= 0.2 * norms.sum():
            break
        count -= max(1, count // 8)
    rest = [tau - tau @ v @ v.T for tau in taus]
    units = [part / (np.linalg.norm(part) + 1e-300) for part in rest]
    alike = np.array([[(a * b).sum() ** 2 for b in units] for a in units])
    np.fill_diagonal(alike, 1.0)
    coefficients = weights / np.maximum(1, alike @ weights)
    return decided @ v.T + sum(c * part for c, part in zip(coefficients, rest, strict=True))
