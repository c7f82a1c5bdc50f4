"""What a failure leaves behind in the threads that calculate with NumPy."""

import pytest
import torch

from mergekit_metagpt.core import arrays

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_after_a_failure_all_threads_stop_and_the_next_call_is_right():
    begun = []

    def fail(item):
        begun.append(item)
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        arrays.on_all_cores(fail, range(1000), CPU)
    assert len(begun) <= 3
    done = []
    arrays.on_all_cores(done.append, range(9), CPU)
    assert sorted(done) == list(range(9))
