"""An ordered map over a bounded number of items in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int = 2
) -> Iterator[Result]:
    """Like `map`, with the calls made by threads; results and the first error keep the order of the items.

    Args:
        function: called once for each item. It should release the GIL most of the time, as large torch operations
            and file I/O do. torch uses one thread inside it.
        items: iterated in the calling thread.
        threads: number of threads; with 0 the calling thread makes the calls.
        ahead: maximum number of calls in flight per thread.
    """
    if not threads:
        yield from map(function, items)
        return
    torch_threads, pending = torch.get_num_threads(), deque[Future[Result]]()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)  # threads started later would begin with the number set last
