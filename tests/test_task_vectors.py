"""The tensor kernels against float64."""

import contextlib
import math
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fine_tunes

from mergekit_metagpt.core import buffers
from mergekit_metagpt.core.task_vectors import add_task_vectors, inner_products, squared_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(
    shape=st.sampled_from([(), (0,), (5,), (4096,), (4097,), (64, 64, 3), (1_100_001,)]),
    dtypes=st.sampled_from(DTYPES).map(lambda dtype: [dtype] * 4)
    | st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    magnitude=st.integers(-30, 30),
    even=st.booleans(),  # where all elements are equal, sums round alike
)
@settings(max_examples=100)
def test_norms_and_products_are_those_of_float64(shape, dtypes, magnitude, even):
    """Although squares may leave the range of float32, and differences that of float16."""
    base, experts = fine_tunes(shape, torch.float64, (1, 1e-2, 1e-3))
    if even:
        base, *experts = (torch.full(shape, value) for value in (-1.1, 1.1, 0.7, -1.1))
    base, *experts = (
        (tensor.double() * 10.0**magnitude)
        .clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        .to(dtype)
        for tensor, dtype in zip((base, *experts), dtypes, strict=True)
    )
    vectors = torch.stack([(e.double() - base.double()).flatten() for e in experts])
    norms = squared_norms(base, experts)
    assert norms == pytest.approx((vectors**2).sum(1).tolist(), rel=1e-6, abs=0)
    products = torch.tensor(inner_products(base, experts), dtype=torch.float64)
    assert products.diagonal().tolist() == norms
    lengths = vectors.norm(dim=1)
    error = (products - vectors @ vectors.T).abs()
    assert (error <= 1e-6 * lengths[:, None] * lengths).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_show_which_input_is_not_finite(dtype):
    for bad in (math.nan, math.inf, -math.inf):
        base, experts = fine_tunes((5000,), dtype, (1, 1))
        experts[1][4321] = bad
        assert list(map(math.isfinite, squared_norms(base, experts))) == [True, False]
        base[0] = bad
        assert not any(map(math.isfinite, squared_norms(base, experts)))


@pytest.mark.parametrize("coefficients", [[0.5, 0.5], [0.2, 0.5], [0.0, 0.0]])
def test_strides_do_not_matter_and_only_what_is_asked_for_is_written(coefficients):
    base, experts = fine_tunes((30, 50), torch.bfloat16, (1, 2))
    copies = [tensor.clone() for tensor in (base, *experts)]
    merged = add_task_vectors(base, experts, coefficients)
    turned = add_task_vectors(base.t(), [e.t() for e in experts], coefficients)
    assert turned.is_contiguous() or not any(coefficients)
    assert torch.equal(turned.t(), merged)
    strided = [e.t().contiguous().t() for e in experts]
    assert squared_norms(base, strided) == squared_norms(base, experts)
    out = torch.empty_like(base)
    assert add_task_vectors(base, experts, coefficients, out=out) is out
    assert torch.equal(out, merged)
    assert all(map(torch.equal, copies, (base, *experts)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 600_000])
def test_the_merge_is_rounded_once(dtype, size):
    base, experts = fine_tunes((size,), dtype, (1, 0.1, 0.01))
    coefficients = [0.7, 0.2, 0.1]
    merged = add_task_vectors(base, experts, coefficients)
    exact = base.double() + sum(
        c * (e.double() - base.double()) for c, e in zip(coefficients, experts, strict=True)
    )
    assert merged.dtype == dtype
    largest = max([1.0, base.double().abs().max().item()] if size else [1.0])
    half_step = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((merged.double() - exact).abs() <= half_step * 1.001 + 4 * 2**-24 * largest).all()


@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("first", [True, False])
def test_a_small_coefficient_is_as_precise_as_a_large_one(small, first):
    base, moved = torch.zeros(5), torch.ones(5)
    pairs = sorted([(moved, small), (base, 1 - small)], key=lambda p: (p[1] == small) != first)
    merged = add_task_vectors(base, *map(list, zip(*pairs, strict=True)))
    assert merged.tolist() == pytest.approx([small] * 5, rel=1e-6)


def test_gradients_flow_through_the_merge():
    base, experts = fine_tunes((50,), torch.float32, (1, 2))
    for tensor in (base, *experts):
        tensor.requires_grad_()
    add_task_vectors(base, experts, [0.25, 0.5]).sum().backward()
    assert torch.allclose(base.grad, torch.full((50,), 0.25))
    assert torch.allclose(experts[1].grad, torch.full((50,), 0.5))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_a_mode_of_the_caller_does_not_outlive_the_call(mode):
    base, experts = fine_tunes((5000,), torch.bfloat16, (1, 2))
    expected = squared_norms(base, experts)
    found = []

    def measure_twice():  # in a thread that has no buffers yet
        for context in (mode(), contextlib.nullcontext()):
            with context:
                found.append(squared_norms(base, experts))
                assert inner_products(base, experts)[1][1] == expected[1]
                assert add_task_vectors(base, experts, [0.5, 0.5]).isfinite().all()

    thread = Thread(target=measure_twice)
    thread.start()
    thread.join()
    assert found == [expected, expected]


class OnDeviceWithoutFloat64(torch.Tensor):
    """What a tensor on Apple's GPUs does: it refuses float64 until it is moved to the host."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_a_device_without_float64_leaves_those_sums_to_the_host(scale, monkeypatch):
    base, experts = fine_tunes((5000,), torch.float32, (1, 2))
    base, experts = base * scale, [expert * scale for expert in experts]
    expected = inner_products(base, experts)
    monkeypatch.setattr(buffers, "_has_float64", lambda device: False)
    base, *experts = (tensor.as_subclass(OnDeviceWithoutFloat64) for tensor in (base, *experts))
    with pytest.raises(TypeError, match="no float64"):
        base.double()
    assert squared_norms(base, experts) == [expected[0][0], expected[1][1]]
    assert inner_products(base, experts) == expected
    assert add_task_vectors(base, experts, [0.5, 0.5]).isfinite().all()
