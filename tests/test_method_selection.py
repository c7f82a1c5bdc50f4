"""Selection against torch's own sort, equal numbers included."""

from functools import partial

import numpy as np
import pytest
import torch

from mergekit_metagpt.method import selection
from mergekit_metagpt.method.selection import fill_pairs, follows_torch, indices_between

# Elsewhere MergeKit's own code sorts. This torch is known to be followed; an older one may not be.
following = pytest.mark.skipif(
    torch.__version__ < (2, 13) and not follows_torch(),
    reason="this torch sorts in another way",
)


def chosen(numbers, start, stop, descending):
    pairs = np.empty(len(numbers), np.int64)
    half = len(numbers) // 2
    fill_pairs(pairs[:half], numbers[:half].numpy(), 0, descending)
    fill_pairs(pairs[half:], numbers[half:].numpy(), half, descending)
    indices = indices_between(pairs, start, stop)
    return None if indices is None else np.sort(indices)


def assert_as_torch(numbers, descending, places):
    order = torch.argsort(numbers, descending=descending).numpy()
    for start, stop in places:
        kept = chosen(numbers, start, stop, descending)
        assert kept is not None
        assert np.array_equal(kept, np.sort(order[start:stop])), (start, stop)


def differences(n, generator, dtype=torch.bfloat16):
    base = (0.02 * torch.randn(n, generator=generator)).to(dtype)
    expert = (base + 0.001 * torch.randn(n, generator=generator)).to(dtype)
    return expert.float().sub_(base.float()).abs_()


KINDS = {
    "equal": lambda n, g: torch.ones(n),
    "zero": lambda n, g: torch.full((n,), -0.0).abs(),
    "two values": lambda n, g: torch.randint(0, 2, (n,), generator=g).float(),
    "few values": lambda n, g: torch.randint(0, 40, (n,), generator=g).float(),
    "mostly zero": lambda n, g: torch.rand(n, generator=g).sub_(0.9).clamp_(min=0),
    "bfloat16 differences": differences,
    "float16 differences": lambda n, g: differences(n, g, torch.float16),
    "float32 differences": lambda n, g: differences(n, g, torch.float32),
    "all different": lambda n, g: torch.randperm(n, generator=g).float(),
    "subnormal": lambda n, g: torch.randint(0, 50, (n,), generator=g).int().view(torch.float32),
    "rising": lambda n, g: torch.arange(n).float(),
    "falling": lambda n, g: torch.arange(n).float().flip(0),
    "infinite": lambda n, g: torch.randn(n, generator=g).exp2().mul_(1e38).mul_(2),
}


@following
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_are_chosen_as_by_torch(kind, descending):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 15, 16, 17, 18, 33, 100, 1000, 5000):
        numbers = KINDS[kind](n, generator)
        middle, tenth = n // 2, n // 10
        places = [(0, 0), (0, n), (0, 1), (n - 1, n), (0, middle), (middle, n), (tenth, n - tenth)]
        assert_as_torch(numbers, descending, places)


@following
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_swapped_as_single_numbers_are(kind, descending):
    generator = torch.Generator().manual_seed(1)
    n = 5 * selection._BLOCK + 123
    numbers = KINDS[kind](n, generator)
    assert_as_torch(numbers, descending, [(0, n // 2), (n // 100, n - n // 3)])


@following
def test_ten_million_differences_of_bfloat16_are_chosen_as_by_torch():
    numbers = differences(10_000_019, torch.Generator().manual_seed(2))
    assert len(numbers.unique()) < 30_000
    assert_as_torch(numbers, True, [(0, 5_500_010)])


@following
def test_no_numbers_are_chosen_where_quicksort_gives_up():
    """Two rising halves split so badly that `std::sort` goes on with a heap sort."""
    numbers = torch.arange(5000).remainder_(2500).float()
    assert chosen(numbers, 0, 2500, descending=True) is None


@following
def test_this_torch_is_followed():
    assert follows_torch()


def test_another_sort_is_noticed(monkeypatch):
    follows_torch.cache_clear()
    monkeypatch.setattr(torch, "argsort", partial(torch.argsort, stable=True))
    assert not follows_torch()
    follows_torch.cache_clear()
