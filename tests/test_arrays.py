"""What a failure, and what a long row, leave behind in the threads that calculate with NumPy."""

import pytest
import torch

from mergekit_metagpt.core import arrays, buffers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_after_a_failure_all_threads_stop_and_the_next_call_is_right():
    begun = []

    def fail(item, _):
        begun.append(item)
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        arrays.on_all_cores(fail, range(1000), CPU)
    assert len(begun) <= 3
    assert arrays.on_all_cores(lambda item, _: item**2, range(9), CPU) == [n**2 for n in range(9)]


def test_room_for_a_long_row_is_not_kept():
    sizes = [10, 2 * buffers._LONGEST, 20]
    arrays.on_all_cores(lambda size, room: room.fit(size), sizes, CPU)
    assert all(room.flags.shape[1] <= buffers._LONGEST for room in buffers._ROOMS)
