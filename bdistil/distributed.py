"""The few collective calls that the library needs; with one process each is the identity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def _active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if _active() else 0


def early_rank() -> int:
    """Number of this process even before there is a process group, as the launcher told it."""
    return int(getattr(rank_zero_only, "rank", None) or 0)


def world_size() -> int:
    """How many processes take part, 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def barrier() -> None:
    """Waits for all processes."""
    if _active():
        dist.barrier()


def _collective_device() -> torch.device:
    """NCCL reduces tensors on its device only; gloo takes those of the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_sum(values: Tensor) -> Tensor:
    """Sum over all processes, on the device of `values`."""
    return _reduced(values, dist.ReduceOp.SUM) if _active() else values


def all_max(values: Tensor) -> Tensor:
    """Maximum over all processes, on the device of `values`."""
    return _reduced(values, dist.ReduceOp.MAX) if _active() else values


def _reduced(values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    moved = values.to(_collective_device(), copy=True)
    dist.all_reduce(moved, how)
    return moved.to(values.device)


def share(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values of process 0, in place."""
    if _active():
        for tensor in tensors:
            moved = tensor.detach().to(_collective_device())
            dist.broadcast(moved, 0)
            tensor.detach().copy_(moved)


def my_blocks(total: int, block: int) -> list[tuple[int, int]]:
    """The rows of this process, as (low, high) of whole blocks.

    Whole blocks, so that a row is computed in the same batch whatever the number of processes: the last bits of a
    batched product depend on the batch.
    """
    lows = list(range(0, total, block))
    first, last = len(lows) * rank() // world_size(), len(lows) * (rank() + 1) // world_size()
    return [(low, min(low + block, total)) for low in lows[first:last]]
