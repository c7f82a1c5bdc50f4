"""New memory in huge pages."""

import gc
import mmap
import pickle

import pytest
import torch
from safetensors.torch import load, save

from mergekit_metagpt.pages import empty_like

SHAPES = [(), (0,), (3, 0, 2), (5,), (7, 3), (1500, 1501), (2, 1100, 1000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_tensor_is_that_of_torch(shape, dtype):
    new, expected = empty_like(torch.zeros(shape), dtype), torch.empty(shape, dtype=dtype)
    assert (new.shape, new.dtype, new.stride()) == (shape, dtype, expected.stride())
    assert new.fill_(3).eq(3).all()


def test_it_has_the_dtype_of_the_other_and_no_gaps():
    other = torch.zeros(2000, 1200, dtype=torch.float16, requires_grad=True)[:, ::2].T
    new = empty_like(other)
    assert new.dtype == torch.float16
    assert new.is_contiguous()
    assert not new.requires_grad


def test_it_outlives_what_it_was_made_of_and_can_be_stored():
    new = empty_like(torch.zeros(2000, 1000)).normal_()
    copy = new.clone()
    gc.collect()
    assert torch.equal(new, copy)
    assert torch.equal(load(save({"t": new}))["t"], copy)
    assert torch.equal(pickle.loads(pickle.dumps(new)), copy)
    view = new.view(-1)[10:]
    del new
    gc.collect()
    assert torch.equal(view, copy.view(-1)[10:])


def test_without_huge_pages_it_is_torch_s(monkeypatch):
    def refused(*_, **__):
        raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert empty_like(torch.zeros(2000, 1000)).shape == (2000, 1000)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty_like(torch.zeros(2000, 1000)).shape == (2000, 1000)


def test_other_devices_have_memory_of_their_own():
    assert empty_like(torch.zeros(2000, 1000, device="meta")).is_meta
