"""An ordered map in threads: order, first error, bounds, and threads that end."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch

from bdistil.utils.threads import ordered_map


@pytest.fixture
def two_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads):
    assert list(ordered_map(lambda x: x * x, range(100), threads=threads)) == [x * x for x in range(100)]
    assert list(ordered_map(abs, [], threads=threads)) == []


def test_calls_overlap():
    both = threading.Barrier(2, timeout=10)
    assert list(ordered_map(lambda x: both.wait() >= 0, range(6), threads=2)) == [True] * 6


def test_the_error_is_that_of_the_first_item_and_no_further_call_begins():
    begun = []

    def work(x):
        begun.append(x)
        if x in (3, 4):
            raise ValueError(f"item {x}")
        return x

    results = ordered_map(work, range(1000), threads=2)
    with pytest.raises(ValueError, match="item 3"):
        deque(results, maxlen=0)
    assert max(begun) < 20


@pytest.mark.parametrize("end", ["whole", "left", "failed"])
@pytest.mark.usefixtures("two_of_torch")
def test_threads_end_and_torch_has_its_own_again(end):
    before, seen = threading.active_count(), []

    def work(x):
        seen.append(torch.get_num_threads())
        assert (end, x) != ("failed", 10)

    results = ordered_map(work, range(50), threads=2)
    try:
        for number, _ in enumerate(results):
            assert torch.get_num_threads() == 2
            if end == "left" and number == 5:
                results.close()
    except AssertionError:
        assert end == "failed"
    assert set(seen) == {1}
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (1, 2), (3, 2)])
def test_few_items_are_read_ahead(threads, ahead):
    read = []

    def items():
        for x in range(40):
            read.append(x)
            yield x

    for x in ordered_map(lambda x: x, items(), threads=threads, ahead=ahead):
        assert len(read) - x <= ahead * threads
