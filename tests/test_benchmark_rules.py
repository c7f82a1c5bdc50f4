"""The merge rules that the benchmark of language models compares with."""

import pytest
import torch
from torch import Tensor

from benchmarks.language_model.rules import RULES, matrices
from benchmarks.language_model.variants import Variant
from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.roles import Role


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(experts: int, m: int, n: int, rank: int) -> Tensor:
    """Return task vectors whose rows and columns are orthogonal to those of each other."""
    left, right = (
        torch.linalg.qr(drawn(length, experts * rank, seed=length)).Q.split(rank, dim=1)
        for length in (m, n)
    )
    pairs = zip(left, right, strict=True)
    return torch.stack([(t + 1) * u @ v.T for t, (u, v) in enumerate(pairs)])


def reading_alike(rank: int, apart: float) -> Tensor:
    """Return three task vectors that read nearly the same inputs, as adapters do."""
    inputs = drawn(rank, 64, seed=4) + apart * drawn(3, rank, 64, seed=6)
    return drawn(3, 30, rank, seed=3) @ inputs


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
@pytest.mark.parametrize("name", ["tsv_m", "wudi"])
def test_orthogonal_task_vectors_are_added_up(name, shape):
    taus = low_rank(3, *shape, rank=2)
    # Where the gradient is 0, Adam's steps are as large as everywhere: 300 of 1e-5 at most.
    atol = 3e-3 if name == "wudi" else 1e-5
    torch.testing.assert_close(RULES[name].matrix(taus), taus.sum(0), atol=atol, rtol=0)


def test_tsv_m_is_the_procrustes_solution_of_the_leading_components():
    taus = drawn(3, 20, 13)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in taus]
    values = torch.cat([values[:4] for _, values, _ in parts])

    def orthogonal(columns: list[Tensor]) -> Tensor:
        p, _, q = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)
        return p @ q

    lefts, rights = [u[:, :4] for u, *_ in parts], [v[:4].T for *_, v in parts]
    expected = orthogonal(lefts) * values @ orthogonal(rights).T
    torch.testing.assert_close(RULES["tsv_m"].matrix(taus), expected, atol=1e-4, rtol=1e-3)


def test_rules_leave_out_experts_that_do_not_move():
    taus = drawn(2, 9, 6)
    padded = torch.cat([taus, torch.zeros(1, 9, 6)])
    for name in ("previous", "wudi"):
        matrix = RULES[name].matrix
        torch.testing.assert_close(matrix(padded), matrix(taus))
    variant = Variant()
    looks = [variant.look(moved, "x") for moved in (taus, padded)]
    torch.testing.assert_close(*map(variant.merge, looks))


@pytest.mark.parametrize(
    ("taus", "exponent"),
    [
        (drawn(3, 60, 40), 0.0),
        (drawn(2, 10, 12), 2.0),
        (drawn(1, 30, 64) + 0.1 * drawn(6, 30, 64, seed=1), 0.0),
        (reading_alike(3, 0.5), 2.0),
    ],
    ids=["some directions", "all directions", "alike", "beyond the limit"],
)
def test_the_default_variant_is_the_rule_of_the_package(taus, exponent):
    base, out = torch.zeros_like(taus[0]), torch.empty_like(taus[0])
    rule = Rule([1.0] * len(taus), exponent)
    merge_directions(base, list(taus), rule, name="x", out=out)
    variant = Variant(exponent=exponent)
    torch.testing.assert_close(variant.merge(variant.look(taus, "x")), out, atol=1e-4, rtol=1e-4)
    for role in (Role.ROWS, Role.ELEMENTS):
        merge_directions(base, list(taus), Rule([1.0] * len(taus)), role=role, out=out)
        (target,), *parts = (matrices(tensor, role) for tensor in (out, *taus))
        merged = Variant().merge_rows(torch.stack([part for (part,) in parts]))
        torch.testing.assert_close(merged, target)
