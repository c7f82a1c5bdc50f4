"""Selection against torch's own sort, equal numbers included."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from mergekit_metagpt.method import selection
from mergekit_metagpt.method.selection import cuts, fill_pairs, follows_torch

# Elsewhere MergeKit's own code sorts. This torch is known to be followed on Linux. An older one may
# not be, nor one that is built with another C++ library.
following = pytest.mark.skipif(
    (sys.platform != "linux" or torch.__version__ < (2, 13)) and not follows_torch(),
    reason="this torch sorts in another way",
)


def cut(numbers, places, descending):
    """Return which numbers are before each place, as a mask; None if quicksort gives up."""
    pairs = np.empty(len(numbers), np.int64)
    half = len(numbers) // 2
    fill_pairs(pairs[:half], numbers[:half].numpy(), 0, descending)
    fill_pairs(pairs[half:], numbers[half:].numpy(), half, descending)
    found = cuts(pairs, places)
    return None if found is None else [before(numbers.numpy(), c, descending) for c in found]


def before(numbers, cut, descending):
    mask = numbers > cut.magnitude if descending else numbers < cut.magnitude
    equal = np.flatnonzero(numbers == cut.magnitude)
    if cut.magnitude != 0:  # which zeros are before a cut does not matter
        assert np.array_equal(np.sort([*cut.before, *cut.behind]), equal)
        assert (np.diff(cut.before) > 0).all()
        assert (np.diff(cut.behind) > 0).all()
    mask[cut.before] = True
    return mask


def assert_as_torch(numbers, descending, all_places):
    order = torch.argsort(numbers, descending=descending).numpy()
    for places in all_places:
        masks = cut(numbers, places, descending)
        assert masks is not None
        for place, mask in zip(places, masks, strict=True):
            expected = np.zeros(len(numbers), bool)
            expected[order[:place]] = True
            assert not numbers.numpy()[mask != expected].any(), (places, place)


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
def test_numbers_are_cut_as_by_torch(kind, descending):
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 15, 16, 17, 18, 33, 100, 1000, 5000):
        numbers = KINDS[kind](n, generator)
        tenth = max(1, n // 10)
        places = [(1,), (n - 1,), (n // 2,), (1, n - 1), (tenth, n - tenth), (n // 2, n // 2)]
        assert_as_torch(numbers, descending, places)


@following
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_swapped_as_single_numbers_are(kind, descending):
    generator = torch.Generator().manual_seed(1)
    n = 5 * selection._BLOCK + 123
    numbers = KINDS[kind](n, generator)
    assert_as_torch(numbers, descending, [(n // 2,), (n // 100, n - n // 3)])


@following
def test_ten_million_differences_of_bfloat16_are_cut_as_by_torch():
    numbers = differences(10_000_019, torch.Generator().manual_seed(2))
    assert len(numbers.unique()) < 30_000
    assert_as_torch(numbers, True, [(5_500_010,)])
    assert_as_torch(numbers, False, [(4_400_000, 9_900_000)])


@following
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_sample_may_mislead_but_cuts_nothing_wrong(kind, monkeypatch):
    monkeypatch.setattr(selection, "_SAMPLE", 64)
    monkeypatch.setattr(selection, "_MARGIN", 4)
    generator = torch.Generator().manual_seed(3)
    for n in (100, 1000, 5000):
        numbers = KINDS[kind](n, generator)
        for places in [(n // 2,), (n // 3,), (n // 10, n - n // 3), (n // 2, n - 1)]:
            if cut(numbers, places, descending=False) is not None:
                assert_as_torch(numbers, False, [places])


@following
def test_there_is_no_cut_where_quicksort_gives_up():
    """Two rising halves split so badly that `std::sort` goes on with a heap sort."""
    numbers = torch.arange(5000).remainder_(2500).float()
    assert cut(numbers, [2500], descending=True) is None


@following
def test_this_torch_is_followed():
    assert follows_torch()


def test_another_sort_is_noticed(monkeypatch):
    follows_torch.cache_clear()
    monkeypatch.setattr(torch, "argsort", partial(torch.argsort, stable=True))
    assert not follows_torch()
    follows_torch.cache_clear()
