"""What a failure leaves behind in the threads that calculate with NumPy."""

import time

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

    def fail_first(item):
        begun.append(item)
        if item == 0:
            raise RuntimeError("no such luck")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="no such luck"):
        arrays.on_all_cores(fail_first, range(1000), CPU)
    assert len(begun) < 500
    done = []
    arrays.on_all_cores(done.append, range(9), CPU)
    assert sorted(done) == list(range(9))
