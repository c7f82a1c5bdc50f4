"""Sparsified merges against MergeKit's own code. Of equal magnitudes the first are kept."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import (
    generalized_task_arithmetic,
    get,
    merge_tensors,
    registered_methods,
)
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod, rescaled_masked_tensor, sparsify

from mergekit_metagpt.core import draws, order_statistics
from mergekit_metagpt.core.inputs import TensorInputs
from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.method import sparsified
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.notes import noted
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.sparsified import merge_sparsified

OURS = [m for m in registered_methods() if isinstance(m, MetaGPTMerge) and not m.is_plain]
BY_RANK = [m for m in OURS if m.stock.sparsification_method == SparsificationMethod.della_magprune]
every_method = pytest.mark.parametrize("method", OURS, ids=lambda method: method.spec.name)


@contextmanager
def in_chunks(size, *, without_numpy=False):
    with ExitStack() as stack:
        for module in (sparsified, draws):
            stack.enter_context(mock.patch.object(module, "chunk_size", return_value=size))
        for module in (draws, order_statistics) if without_numpy else ():
            stack.enter_context(mock.patch.object(module, "as_array", lambda tensor: tensor))
        yield


# The arithmetic of a CPU in several chunks and in one, and that of an accelerator, which has no
# NumPy, on a CPU.
WAYS = {
    "several chunks": partial(in_chunks, 1 << 12),
    "one chunk": partial(in_chunks, 1 << 25),
    "an accelerator": partial(in_chunks, 1 << 25, without_numpy=True),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def differences(n, generator, dtype=torch.bfloat16):
    base = (0.02 * torch.randn(n, generator=generator)).to(dtype)
    expert = (base + 0.001 * torch.randn(n, generator=generator)).to(dtype)
    return expert.float() - base.float()


def signed(magnitudes, generator):
    return magnitudes * torch.randint(0, 2, magnitudes.shape, generator=generator).mul(2).sub(1)


KINDS = {
    "equal": lambda n, g: signed(torch.ones(n), g),
    "zero": lambda n, g: torch.full((n,), -0.0),
    "two values": lambda n, g: signed(torch.randint(1, 3, (n,), generator=g).float(), g),
    "few values": lambda n, g: torch.randint(-20, 21, (n,), generator=g).float(),
    "mostly zero": lambda n, g: torch.rand(n, generator=g).sub_(0.9).clamp_(min=0),
    "bfloat16 differences": differences,
    "float16 differences": lambda n, g: differences(n, g, torch.float16),
    "float32 differences": lambda n, g: differences(n, g, torch.float32),
    "all different": lambda n, g: signed(torch.randperm(n, generator=g).float(), g),
    "subnormal": lambda n, g: torch.randint(-50, 50, (n,), generator=g) * 2.0**-149,
    "rising": lambda n, g: torch.arange(n).float(),
    "two rising halves": lambda n, g: torch.arange(n).remainder_(1 + n // 2).float(),
    "strided": lambda n, g: torch.randn(n, 2, generator=g)[:, 0],
    "large": lambda n, g: torch.randn(n, generator=g) * 1e37,
}


def first_in_memory(tensor, kept):
    """Return as many numbers of each magnitude as are kept, but the first ones."""
    flat, result = tensor.reshape(-1), torch.zeros(tensor.numel())
    magnitudes = flat.abs().numpy()
    order = np.argsort(magnitudes, kind="stable")
    ordered, left = magnitudes[order], np.sort(kept[kept != 0].abs().numpy())
    number = np.arange(len(order)) - np.searchsorted(ordered, ordered)  # among its equals
    wanted = np.searchsorted(left, ordered, "right") - np.searchsorted(left, ordered)
    places = torch.from_numpy(order[number < wanted])
    result[places] = flat[places].float()
    return result.view(tensor.shape)


def family(shape, dtype, experts=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    base[base.abs() < 0.002] *= 0  # zeros of both signs
    tuned = []
    for number in range(experts):
        expert = base + 0.001 * (1 + number) * torch.randn(shape, generator=generator)
        unchanged = torch.rand(shape, generator=generator) < 0.2
        tuned.append(torch.where(unchanged, base, expert))
    return base.to(dtype), [expert.to(dtype) for expert in tuned]


def ours_and_coefficients(method, base, experts, **parameters):
    names = {p.name for p in method.spec.parameters}
    with noted() as entries:
        merged = merge_tensors(
            [base, *experts], method, base_index=0, name="w", ids=["base", *range(len(experts))],
            parameters={name: value for name, value in parameters.items() if name in names},
        )  # fmt: skip
    return merged, entries[0].coefficients


def reference(method, base, experts, coefficients, **parameters):
    """Merge with MergeKit's code alone: a float32 base, and the coefficients as weights."""
    stock, ids = method.stock, ["base", *range(len(experts))]
    exact = base.to(working_dtype(base.dtype))
    group = TensorGroup.from_tensors([exact, *experts], ids=ids, base_index=0, name="w")
    bound = {"int8_mask": False, "normalize": stock.default_normalize, "lambda": 1.0}
    bound |= {"rescale": stock.default_rescale, "weight": dict(enumerate(coefficients))}
    names = {p.name for p in method.spec.parameters}
    for name, value in parameters.items():
        if name in ("density", "gamma", "epsilon"):
            each = value if isinstance(value, list) else [value] * len(experts)
            value = dict(enumerate(each))
        bound |= {name: value} if name in names else {}
    with own_stream(base.device, f"{stock.spec.name}/w"):
        return stock.merge_group(group, **bound).to(base.dtype)


def bits(tensor):
    """Return the bit patterns, which tell -0.0 from 0.0."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()])


USUAL = {"density": 0.55, "gamma": 0.05, "epsilon": 0.2, "rescale": False}


def assert_same_bytes(method, base, experts, **changes):
    parameters = {**USUAL, **changes}
    ours, coefficients = ours_and_coefficients(method, base, experts, **parameters)
    theirs = reference(method, base, experts, coefficients, **parameters)
    assert ours.dtype == theirs.dtype == base.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


def by_the_rule(tensor, density, method, gamma=0, epsilon=0, rescale_norm=None):
    """Sparsify as MergeKit, but prefer the first of equal magnitudes."""
    if method != SparsificationMethod.della_magprune or not 0 < density < 1:
        kept = sparsify(tensor, density, method, gamma, epsilon, rescale_norm)
        is_random = method in (SparsificationMethod.random, SparsificationMethod.della_magprune)
        return kept if is_random or density >= 1 else first_in_memory(tensor, kept)
    rows = tensor if tensor.dim() > 1 else tensor.unsqueeze(0)
    length = rows.shape[1]
    ranks = length - rows.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1).float()
    share = (ranks - 1) / (length - 1)
    mask = torch.bernoulli((density - epsilon) + share * 2 * epsilon)
    return rescaled_masked_tensor(rows, mask, rescale_norm).reshape(tensor.shape)


@pytest.fixture
def rule(monkeypatch):
    """Let the reference prefer the first of equal magnitudes."""
    monkeypatch.setattr(generalized_task_arithmetic, "sparsify", by_the_rule)


SHAPES = [(2,), (17,), (5000,), (61, 83), (3, 40, 50), (5, 1100), (2, 3, 4, 5)]


@every_way
@given(
    method=st.sampled_from(OURS),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["as it is", "zeros", "strided", "turned"]),
    magnitude=st.integers(-4, 3),
    densities=st.sampled_from([[0.3, 0.55, 0.8], [0.0, 1e-4, 0.3, 0.999, 1.0]]).flatmap(
        lambda some: st.lists(st.sampled_from(some), min_size=1, max_size=9)
    ),
    settings_=st.fixed_dictionaries(
        {
            "gamma": st.sampled_from([0.01, 0.05, 0.5]),
            "epsilon": st.floats(0, 0.99),
            "lambda": st.sampled_from([1.0, -0.7, 0.0]),
        },
        optional={"normalize": st.booleans(), "int8_mask": st.booleans()},
    ),
)
@settings(max_examples=120)
def test_the_bytes_are_those_of_mergekit(
    way, rule, method, shape, dtype, layout, magnitude, densities, settings_
):
    base, experts = family(shape, torch.float64, experts=len(densities))
    base, *experts = ((10.0**magnitude * it).to(dtype) for it in (base, *experts))
    if layout == "zeros":  # keep their signs
        base = base * -0.0
    elif layout == "strided":
        experts = [torch.stack([expert, expert], dim=-1)[..., 0] for expert in experts]
    elif layout == "turned":
        axes = tuple(reversed(range(len(shape))))
        base, *experts = (tensor.permute(axes) for tensor in (base, *experts))
    # MergeKit wants density ± epsilon between 0 and 1.
    settings_["epsilon"] *= min(min(density, 1 - density) for density in densities)
    with way():
        assert_same_bytes(method, base, experts, density=densities, **settings_)


@every_way
@given(
    name=st.sampled_from(["metagpt_ties", "metagpt_breadcrumbs"]),
    kind=st.sampled_from(sorted(KINDS)),
    size=st.one_of(st.integers(1, 40), st.integers(41, 5000)),
    seed=st.integers(0, 2**31),
    density=st.one_of(st.sampled_from([0.0, 1.0, "one"]), st.floats(0, 1)),
    gamma=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
)
@settings(max_examples=120)
def test_of_equal_ones_the_first_are_kept(way, rule, name, kind, size, seed, density, gamma):
    tensor = KINDS[kind](size, torch.Generator().manual_seed(seed))
    density = 1 / size if density == "one" else density
    with way():
        assert_same_bytes(get(name), torch.zeros(size), [tensor], density=density, gamma=gamma)


@pytest.mark.parametrize("name", ["metagpt_ties", "metagpt_breadcrumbs"])
def test_a_sample_may_mislead_but_keeps_nothing_wrong(name, rule, monkeypatch):
    for wrong in ((1e-9, 2e-9), (1.0, 1.0), (1.0, 2.0)):
        both = [wrong, (3.0, 4.0)]
        wrongly = lambda *it, both=both: [both[: len(places)] for places in it[-1]]  # noqa: E731
        monkeypatch.setattr(order_statistics, "_limits", wrongly)
        for kind in KINDS.values():
            tensor = kind(3000, torch.Generator().manual_seed(3))
            for density in (0.3, 0.5):
                assert_same_bytes(get(name), torch.zeros(3000), [tensor], density=density)


@every_way
@pytest.mark.parametrize("kind", ["equal", "two values", "few values", "bfloat16 differences"])
def test_of_equal_ones_the_first_have_the_highest_ranks(way, rule, kind):
    tensor = KINDS[kind](5000, torch.Generator().manual_seed(4)).view(5, 100, 10)
    with way():
        base, parameters = torch.zeros_like(tensor), {"density": 0.5, "epsilon": 0.4}
        assert_same_bytes(get("metagpt_della"), base, [tensor], **parameters)


def test_ranks_that_draws_need_are_exact():
    infinite = np.float32(np.inf)
    for length, spread in ((70_000, 0.3), (16_777_219, 0.9)):
        rising = (torch.arange(length).float() / (length - 1) * spread + 0.05).numpy()
        near = rising[-100_000:]
        for values in (near, np.nextafter(near, infinite), np.nextafter(near, -infinite)):
            inside = values[(values >= rising[0]) & (values < rising[-1])]
            counts = draws._counts_up_to(inside, rising)
            assert (counts == np.searchsorted(rising, inside, side="right")).all()


def test_a_million_differences_are_kept_as_in_mergekit(rule):
    for name, dtype in (("ties", torch.bfloat16), ("breadcrumbs", torch.float32)):
        tensor = differences(1_100_017, torch.Generator().manual_seed(2), dtype)
        assert_same_bytes(get(f"metagpt_{name}"), torch.zeros(1_100_017), [tensor])


@every_method
def test_rescaled_merges_differ_from_mergekits_by_rounding_only(method):
    base, experts = family((61, 83), torch.float32)
    for settings_ in ({}, {"density": [0.3, 1.0, 0.0]}, {"normalize": True, "lambda": 1.3}):
        parameters = {**USUAL, "rescale": True, **settings_}
        ours, coefficients = ours_and_coefficients(method, base, experts, **parameters)
        theirs = reference(method, base, experts, coefficients, **parameters)
        torch.testing.assert_close(ours - base, theirs - base, rtol=1e-6, atol=1e-8)
    # The sum of these is too small to be rescaled.
    assert_same_bytes(method, base * 0, [base * 1e-12], rescale=True)


def test_dtypes_may_be_mixed(rule):
    base, experts = family((61, 83), torch.bfloat16)
    experts[0] = experts[0].float() * 1.001
    inputs = TensorInputs("w", "base", base, (0, 1, 2), tuple(experts))
    bound = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    bound |= {"density": dict.fromkeys(range(3), 0.55), "weight": dict.fromkeys(range(3), 0.3)}
    theirs = reference(get("metagpt_ties"), base, experts, [0.3] * 3, density=0.55)
    assert torch.equal(bits(merge_sparsified(get("ties"), inputs, bound)), bits(theirs))


@every_method
def test_threads_chunks_modes_and_devices_of_the_caller_do_not_matter(method, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    base, experts = family((101, 1023), torch.bfloat16, experts=4)

    def merge(_=None):
        copies = [tensor.clone() for tensor in (base, *experts)]
        return ours_and_coefficients(method, copies[0], copies[1:], rescale=True, density=0.6)[0]

    def merge_in_inference_mode(_):
        with torch.inference_mode():
            return merge()

    expected = merge()
    for threads, size in ((1, 1 << 14), (3, 1 << 16), (8, 1 << 20)):
        torch.set_num_threads(threads)
        with in_chunks(size):
            assert torch.equal(bits(merge()), bits(expected))
    with ThreadPoolExecutor(4) as pool:
        for merged in pool.map(merge_in_inference_mode, "abcd"):
            assert torch.equal(merged, expected)
    with torch.device("meta"):
        assert torch.equal(merge(), expected)


def test_a_process_may_flush_subnormal_numbers_to_zero(request):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    request.addfinalizer(partial(torch.set_flush_denormal, False))
    for method in OURS:
        merged, _ = ours_and_coefficients(method, *family((61, 83), torch.float32))
        assert merged.isfinite().all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.2), (0.1, 0.1)])
def test_probabilities_beyond_0_and_1_are_refused_as_in_mergekit(density, epsilon):
    base, experts = family((61, 83), torch.float32)
    for method in BY_RANK:
        for merge in (ours_and_coefficients, partial(reference, coefficients=[1.0] * 3)):
            with pytest.raises(ValueError, match="density"):
                merge(method, base, experts, density=density, epsilon=epsilon)


def test_gradients_flow_through_a_sparsified_merge():
    method, (base, experts) = get("metagpt_ties"), family((20, 30), torch.float32)
    for tensor in (base, *experts):
        tensor.requires_grad_()
    ours_and_coefficients(method, base, experts, density=0.5)[0].sum().backward()
    assert base.grad is not None
    assert any(expert.grad.any() for expert in experts)
    with torch.no_grad():
        assert not ours_and_coefficients(method, base, experts)[0].requires_grad


def test_methods_that_others_derive_are_left_to_mergekit():
    class Own(GeneralizedTaskArithmeticMerge):
        def merge_group(self, group, /, **parameters):
            return group.base.tensor + 1

    settings_ = (ConsensusMethod.count, None, False, False, "own", "Own", None)
    base, experts = family((61, 83), torch.bfloat16)
    stock, provider = GeneralizedTaskArithmeticMerge(*settings_), OURS[0].provider
    assert_same_bytes(MetaGPTMerge(stock, provider), base, experts)
    own = MetaGPTMerge(Own(*settings_), provider)
    assert torch.equal(ours_and_coefficients(own, base, experts)[0], base.float().add(1).bfloat16())
