"""Work that threads share, in the order of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int = 2) -> Iterator[Result]:
    """Results of some work on items, in their order; an error is that of the first item.

    The items are asked for in the thread of the caller, few ahead of their results. Where it would wait for a result it
    works on other items: a thread that sleeps costs more to wake than the work on a small item takes. Each thread
    counts as one of torch's.

    Args:
        work: releases Python's lock most of the time, as large operations of torch and of files do.
        items: to work on.
        threads: beside the caller; with none the caller does it all.
        ahead: items under way for each thread, the caller too, before the next result is waited for.
    """
    if not threads:
        yield from map(work, items)
        return
    crew, under_way = Crew(work, threads), deque[Job[Item, Result]]()
    try:
        for item in items:
            under_way.append(crew.give(item))
            if len(under_way) >= ahead * (threads + 1):
                yield crew.result(under_way.popleft())
        while under_way:
            yield crew.result(under_way.popleft())
    finally:
        crew.stop()


class Job(Generic[Item, Result]):
    """An item, and what came of it."""

    result: Result

    def __init__(self, item: Item) -> None:
        self.item = item
        self.error: BaseException | None = None
        self.under_way = Lock()
        self.under_way.acquire()

    def do(self, work: Callable[[Item], Result]) -> None:
        """Works on the item. An error is kept for the one who asks for the result."""
        try:
            self.result = work(self.item)
        except BaseException as error:
            self.error = error
        self.under_way.release()


class Crew(Generic[Item, Result]):
    """Threads that take items from one queue. It costs a tenth of a pool's futures.

    Args:
        work: on an item.
        threads: beside the caller.
    """

    def __init__(self, work: Callable[[Item], Result], threads: int) -> None:
        self._work, self._of_caller = work, torch.get_num_threads()
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while job := self._jobs.get():
            job.do(self._work)

    def give(self, item: Item) -> Job[Item, Result]:
        """Adds an item."""
        job: Job[Item, Result] = Job(item)
        self._jobs.put(job)
        return job

    def result(self, job: Job[Item, Result]) -> Result:
        """The result of a job, or its error. While others work on it, the caller works on what nobody has begun."""
        torch.set_num_threads(1)
        while job.under_way.locked():
            try:
                other = self._jobs.get_nowait()
            except Empty:
                job.under_way.acquire()
                break
            other.do(self._work)
            if other.error is not None and not isinstance(other.error, Exception):
                raise other.error  # Ctrl-C, which asked this thread
        torch.set_num_threads(self._of_caller)
        if job.error is not None:
            raise job.error
        return job.result

    def stop(self) -> None:
        """Has the threads end after the item that each works on, and waits for that."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        torch.set_num_threads(self._of_caller)  # a thread's own number is what threads to come start with, too
