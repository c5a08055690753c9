"""Collective operations; with a single process each is the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

# Blocks that a process owns in a row: 4 x 512 rows of 16 bits or more end at a page of memory (4096 bytes), which the
# cache of a network disk writes as a whole, so that two hosts that shared a page would overwrite each other's rows.
GROUP = 4


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Sharers(NamedTuple):
    """The processes that share a disk: this one's rank among them, their number, whether process 0 is among them."""

    rank: int
    size: int
    first: bool


_sharers: Sharers | None = None


@contextmanager
def within(sharers: Sharers | None) -> Iterator[None]:
    """Context for work repeated on every disk: ranks are those within `sharers`, and sums count one disk only."""
    global _sharers
    before, _sharers = _sharers, sharers
    try:
        yield
    finally:
        _sharers = before


def sharers_of(folder: Path) -> Sharers | None:
    """Finds the processes that see the same folder, under any launcher; None with a single process."""
    if not _active():
        return None
    place = folder / f".processes.{from_first(uuid4().hex)}"
    place.mkdir(parents=True, exist_ok=True)
    mine = place / str(dist.get_rank())
    mine.touch()
    barrier()
    found = sorted(int(file.name) for file in place.iterdir())
    barrier()
    mine.unlink()
    with suppress(OSError):  # not empty yet: the last process removes it
        place.rmdir()
    return Sharers(found.index(dist.get_rank()), len(found), found[0] == 0)


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    if not _active():
        return 0
    return dist.get_rank() if _sharers is None else _sharers.rank


def early_rank() -> int:
    """Rank of this process as set by the launcher, available before the process group is initialised."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    if not _active():
        return 1
    return dist.get_world_size() if _sharers is None else _sharers.size


def barrier() -> None:
    """Waits for all processes."""
    if _active():
        dist.barrier()


def _collective_device() -> torch.device:
    """Device that the backend requires for tensors: the GPU for NCCL, the CPU for gloo."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_sum(values: Tensor) -> Tensor:
    """Sum over all processes, on the device of `values`."""
    if not _active():
        return values
    counted = values if _sharers is None or _sharers.first else torch.zeros_like(values)
    return _reduced(counted, dist.ReduceOp.SUM)


def all_rows(values: Tensor) -> Tensor:
    """Rows (n, ...) of all processes, in their order, on the CPU; n may differ between them."""
    if not _active():
        return values
    counted = values if _sharers is None or _sharers.first else values[:0]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, counted.cpu().numpy())
    return torch.cat([torch.from_numpy(rows) for rows in found])


def all_mean(values: Tensor) -> Tensor:
    """Mean over all processes, on the device of `values`."""
    return all_sum(values) / world_size()


def all_max(values: Tensor) -> Tensor:
    """Maximum over all processes, on the device of `values`."""
    return _reduced(values, dist.ReduceOp.MAX) if _active() else values


def _reduced(values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    moved = values.to(_collective_device(), copy=True)
    dist.all_reduce(moved, how)
    return moved.to(values.device)


def all_true(flag: bool) -> bool:
    """Whether a flag is true on all processes."""
    return not bool(all_max(torch.tensor(float(not flag))))


def from_first(value: Any) -> Any:
    """Broadcasts a plain value from process 0."""
    if not _active():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, device=_collective_device())
    return values[0]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcasts tensors from process 0, in place."""
    if _active():
        for tensor in tensors:
            moved = tensor.detach().to(_collective_device())
            dist.broadcast(moved, 0)
            tensor.detach().copy_(moved)


def my_blocks(total: int, block: int) -> list[tuple[int, int]]:
    """The rows assigned to this process, as (low, high) of whole blocks.

    Whole blocks keep each row in the same batch for any number of processes: the last bits of a batched product
    depend on the batch. Groups of blocks keep hosts apart that write to one file on a network disk, see `GROUP`.
    """
    lows = list(range(0, total, block))
    groups = -(-len(lows) // GROUP)
    first, last = (GROUP * (groups * number // world_size()) for number in (rank(), rank() + 1))
    return [(low, min(low + block, total)) for low in lows[first:last]]
