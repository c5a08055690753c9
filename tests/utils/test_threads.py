"""Work that threads share, in the order of one."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch

from bdistil.utils.threads import in_order


@pytest.fixture
def two_of_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def me():
    return threading.current_thread()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads):
    assert list(in_order(lambda x: x * x, range(100), threads)) == [x * x for x in range(100)]
    assert list(in_order(abs, [], threads)) == []


class Held:
    """Items 0 … n - 1, of which the first is held by the one thread beside the caller until it is let go."""

    def __init__(self, n):
        self.n, self.taken, self.gate = n, threading.Event(), threading.Event()

    def __iter__(self):
        yield 0
        assert self.taken.wait(10)
        yield from range(1, self.n)

    def hold(self):
        self.taken.set()
        assert self.gate.wait(10)

    def let_go(self):
        self.gate.set()


def test_the_caller_works_on_what_nobody_has_begun_while_it_waits():
    held = Held(4)

    def work(x):
        if x == 0:
            held.hold()
        if x == 3:
            held.let_go()
        return me()

    first, *others = in_order(work, held, threads=1)
    assert first is not me()
    assert others == [me()] * 3


@pytest.mark.parametrize("helps", [True, False])
def test_an_interruption_reaches_the_caller(helps):
    held = Held(10)

    def work(x):
        if x == 0 and helps:
            held.hold()
            raise ValueError  # which comes before, and does not hide it
        held.let_go()
        held.taken.set()
        if (me() is threading.main_thread()) == helps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deque(in_order(work, held, threads=1), maxlen=0)


def test_the_error_is_that_of_the_first_item_and_no_further_one_is_begun():
    begun = []

    def work(x):
        begun.append(x)
        if x in (3, 4):
            raise ValueError(f"item {x}")
        return x

    results = in_order(work, range(1000), threads=2)
    with pytest.raises(ValueError, match="item 3"):
        deque(results, maxlen=0)
    assert max(begun) < 20


@pytest.mark.parametrize("end", ["whole", "left", "failed"])
@pytest.mark.usefixtures("two_of_torch")
def test_threads_end_and_torch_has_its_own_again(end):
    before, seen, held = threading.active_count(), [], Held(50)

    def work(x):
        seen.append(torch.get_num_threads())
        held.taken.set()
        assert (end, x) != ("failed", 10)

    results = in_order(work, held, threads=2)
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


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (1, 2), (3, 2)])
def test_items_are_asked_for_few_ahead(threads, ahead):
    asked = []

    def items():
        for x in range(40):
            asked.append(x)
            yield x

    for x in in_order(lambda x: x, items(), threads, ahead):
        assert len(asked) - x <= ahead * (threads + 1)
