"""Work that threads share, in the order of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int = 2) -> Iterator[Result]:
    """Results of some work on items, in their order; an error is that of the first item.

    The items are asked for in the thread of the caller, few ahead of the work. Each thread counts as one of torch's.

    Args:
        work: releases Python's lock most of the time, as large operations of torch and of files do.
        items: to work on.
        threads: that take items in turns, beside the caller; with none the caller does it all.
        ahead: items that a thread is given before the caller waits for one.
    """
    if not threads:
        yield from map(work, items)
        return
    of_torch = torch.get_num_threads()
    lanes = [Lane(work) for _ in range(threads)]
    under_way: deque[Lane[Item, Result]] = deque()
    try:
        for number, item in enumerate(items):
            under_way.append(lanes[number % threads])
            under_way[-1].give(item)
            if len(under_way) > ahead * threads:
                yield under_way.popleft().take()
        while under_way:
            yield under_way.popleft().take()
    finally:
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.join()
        torch.set_num_threads(of_torch)  # a thread's own number is what threads to come start with, too


class Lane(Thread, Generic[Item, Result]):
    """A thread that works on items one after the other. Its queues cost a tenth of a pool's futures.

    Args:
        work: on an item.
    """

    def __init__(self, work: Callable[[Item], Result]) -> None:
        super().__init__(daemon=True)
        self._work: Callable[[Item], Result] | None = work
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.start()

    def run(self) -> None:
        """Works until there is nothing more to do."""
        torch.set_num_threads(1)
        while True:
            item = self._items.get()
            if (work := self._work) is None:
                return
            try:
                self._results.put((work(item), None))
            except BaseException as error:  # raised again where the result is waited for
                self._results.put((None, error))

    def give(self, item: Item) -> None:
        """Adds an item."""
        self._items.put(item)

    def take(self) -> Result:
        """Waits for the result of the next item, and raises its error."""
        result, error = self._results.get()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Has the thread end after the item that it works on."""
        self._work = None
        self._items.put(None)
