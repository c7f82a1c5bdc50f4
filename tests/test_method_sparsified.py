"""Sparsified merges against MergeKit's own code, byte for byte."""

import pytest
import torch
from mergekit.merge_methods import get, merge_tensors, registered_methods
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)

from mergekit_metagpt.core.task_vectors import working_dtype
from mergekit_metagpt.measure.survey import TensorInputs
from mergekit_metagpt.method import kept, masks
from mergekit_metagpt.method.merge_method import MetaGPTMerge
from mergekit_metagpt.method.random_streams import own_stream
from mergekit_metagpt.method.session import SESSION
from mergekit_metagpt.method.sparsified import merge_sparsified

OURS = [m for m in registered_methods() if isinstance(m, MetaGPTMerge) and not m.is_plain]
BY_MAGNITUDE = [m for m in OURS if not m.is_random]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name_of(method):
    return method.spec.name


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


def reference(method, base, experts, parameters, weights):
    """Merge with MergeKit's code alone: a float32 base, and the coefficients as weights."""
    exact = base.to(working_dtype(base.dtype))
    ids = ["base", *range(len(experts))]
    group = TensorGroup.from_tensors([exact, *experts], ids=ids, base_index=0, name="w")
    per_expert = {
        name: dict.fromkeys(range(len(experts)), value) if isinstance(value, float) else value
        for name, value in parameters.items()
        if name in ("density", "gamma", "epsilon")
    }
    bound = {"int8_mask": False, "normalize": method.default_normalize}
    bound |= {"rescale": method.default_rescale, "lambda": 1.0, **parameters, **per_expert}
    with own_stream(base.device, f"{method.spec.name}/w"):
        merged = method.merge_group(group, **{**bound, "weight": dict(enumerate(weights))})
    return merged.to(base.dtype)


def assert_same_bytes(method, base, experts, **changes):
    names = {p.name for p in method.spec.parameters}
    chosen = {"density": 0.55, "gamma": 0.05, "epsilon": 0.2, **changes}
    parameters = {name: value for name, value in chosen.items() if name in names}
    with SESSION.journal() as entries:
        ours = merge_tensors(
            [base, *experts], method, base_index=0, parameters=parameters, name="w",
            ids=["base", *range(len(experts))],
        )  # fmt: skip
    bound = {k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in parameters.items()}
    theirs = reference(method.stock, base, experts, bound, entries[0].coefficients)
    assert ours.dtype == theirs.dtype == base.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(bits(ours), bits(theirs))


def bits(tensor):
    """Return the bit patterns, which tell -0.0 from 0.0."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let small tensors have several chunks."""
    monkeypatch.setattr(kept, "_CHUNK", 1 << 10)
    monkeypatch.setattr(masks, "_SORTED", 1 << 10)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (17,), (5000,), (61, 83), (3, 40, 50), (5, 1100)])
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_the_bytes_are_those_of_mergekit(method, shape, dtype):
    base, experts = family(shape, dtype)
    assert_same_bytes(method, base, experts)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale": True},
        {"rescale": False},
        {"normalize": True},
        {"normalize": False},
        {"int8_mask": True},
        {"lambda": -0.7},
        {"lambda": 0.0},
        {"rescale": True, "normalize": True, "lambda": 1.3, "int8_mask": True},
        {"density": 1.0},
        {"density": 0.0},
        {"density": [0.3, 1.0, 0.7]},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_every_setting_has_the_effect_it_has_in_mergekit(method, changes):
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base, experts, **changes)


@pytest.fixture
def set_threads():
    """Set how many threads torch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_large_chunks_are_merged_as_in_mergekit(method, count, threads, monkeypatch, set_threads):
    monkeypatch.undo()  # torch divides chunks of the usual size
    set_threads(threads)
    assert_same_bytes(method, *family((701, 1023), torch.bfloat16, experts=count))


@pytest.mark.parametrize("settings", [{}, {"rescale": True, "density": [0.3, 1.0, 0.7]}], ids=str)
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_threads_merge_to_the_bytes_of_mergekit(method, settings, set_threads):
    set_threads(3)
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base, experts, **settings)
    with torch.inference_mode():
        assert_same_bytes(method, base.clone(), [expert.clone() for expert in experts], **settings)


@pytest.mark.parametrize("density", [1 / 5063, 0.01, 0.999, 1 - 1 / 5063])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("method", BY_MAGNITUDE, ids=name_of)
def test_few_numbers_and_almost_all_are_kept_as_in_mergekit(method, gamma, density):
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base, experts, density=density, gamma=gamma)


@pytest.mark.parametrize("shape", [(3, 1111), (2, 64), (1, 129), (257,), (1281,)])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_any_number_of_experts_is_summed_as_in_mergekit(method, count, shape):
    base, experts = family(shape, torch.float32, experts=count)
    assert_same_bytes(method, base, experts, normalize=True)


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_zeros_keep_their_signs(method):
    base, experts = family((2000,), torch.float32, experts=1)
    base[::2] = -0.0
    assert_same_bytes(method, base, experts, **{"lambda": -1.0})
    assert_same_bytes(method, base, experts)


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_strides_do_not_matter(method):
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base.t(), [expert.t() for expert in experts])
    assert_same_bytes(method, base, [expert.t().contiguous().t() for expert in experts])


def test_dtypes_may_be_mixed():
    base, experts = family((61, 83), torch.bfloat16)
    experts[0] = experts[0].float()
    inputs = TensorInputs("w", "base", base, (0, 1, 2), tuple(experts))
    bound = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    bound |= {"density": dict.fromkeys(range(3), 0.55), "weight": dict.fromkeys(range(3), 0.3)}
    stock = get("ties")
    ours = merge_sparsified(stock, inputs, bound)
    theirs = reference(stock, base, experts, bound, [0.3] * 3)
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("method", BY_MAGNITUDE, ids=name_of)
def test_equal_magnitudes_are_kept_as_in_mergekit(method):
    base = torch.zeros(3000)
    experts = [torch.ones(3000), torch.arange(3000).remainder(2) - 0.5]
    assert_same_bytes(method, base, experts)


@pytest.mark.parametrize("method", BY_MAGNITUDE, ids=name_of)
def test_where_quicksort_gives_up_mergekit_sorts(method):
    base, expert = torch.zeros(5000), torch.arange(5000).remainder(2500).float()
    assert_same_bytes(method, base, [expert], density=0.5, gamma=0.1)


@pytest.mark.parametrize("method", BY_MAGNITUDE, ids=name_of)
def test_where_torch_sorts_otherwise_mergekit_sorts(method, monkeypatch):
    monkeypatch.setattr(masks, "follows_torch", lambda: False)
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base, experts)


RANDOM = [m for m in OURS if m.is_random]


def test_this_torch_draws_uniform_and_bernoulli_numbers_alike():
    assert masks._uniform_below_is_bernoulli()


@pytest.mark.parametrize("method", RANDOM, ids=name_of)
def test_where_torch_draws_otherwise_bernoulli_draws(method, monkeypatch):
    monkeypatch.setattr(masks, "_uniform_below_is_bernoulli", lambda: False)
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(method, base, experts)


@pytest.mark.parametrize("method", OURS, ids=name_of)
def test_gradients_flow_through_a_sparsified_merge(method):
    base, experts = family((20, 30), torch.float32)
    for tensor in (base, *experts):
        tensor.requires_grad_()
    merge_tensors(
        [base, *experts], method, base_index=0, parameters={"density": 0.5}, name="w"
    ).sum().backward()
    assert base.grad is not None
    assert any(expert.grad.any() for expert in experts)
    with torch.no_grad():
        merged = merge_tensors([base, *experts], method, base_index=0, name="w")
    assert not merged.requires_grad


def test_a_method_that_sparsifies_in_another_way_is_mergekits():
    plain = GeneralizedTaskArithmeticMerge(
        ConsensusMethod.count, None, False, False, "signs", "Signs", None
    )
    base, experts = family((61, 83), torch.bfloat16)
    assert_same_bytes(MetaGPTMerge(plain), base, experts)


def test_a_large_tensor_merges_to_the_bytes_of_mergekit(monkeypatch):
    monkeypatch.undo()
    base, experts = family((1301, 1009), torch.bfloat16)
    for name in ("metagpt_ties", "metagpt_breadcrumbs", "metagpt_dare_linear", "metagpt_della"):
        assert_same_bytes(get(name), base, experts)
