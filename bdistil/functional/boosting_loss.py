"""The loss of one round as training calls it: value and gradient in closed form, in as few operations as can be.

The same arithmetic runs in NumPy for small batches on the CPU, where calling torch takes longer than computing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdistil.functional.boosting import BARRIER_FLOOR

# Numbers of a batch up to which NumPy, over the same memory, is several times faster than torch's dispatch.
SMALL = 1 << 16
# The sign of eta S in K+ and in K-.
SIGNS = np.array([-1, 1], np.float32).reshape(2, 1, 1)


def _floored_array(argument: Any) -> tuple[Any, Any]:
    """The argument of a logarithm, at least `BARRIER_FLOOR`, and what that adds up to (<= 0): mostly nothing."""
    if argument.min() >= BARRIER_FLOOR:
        return argument, 0.0
    safe = np.maximum(argument, BARRIER_FLOOR)
    return safe, (argument - safe).sum()


def _floored_tensor(argument: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a look at the values, for which a device would have to be waited for."""
    safe = argument.clamp_min(BARRIER_FLOOR)
    return safe, (argument - safe).sum()


def _closed_form(
    xp: Any, floored: Any, d: Any, s: Any, log_z: Any, signs: Any, eta: float, share: float, gamma: float, across: Any
) -> tuple[Any, Any]:
    """Value () and gradient (B, L) of `round_loss`, for arrays of torch or of NumPy (`xp`) alike.

    Both games at once, in few and large operations: between two steps of a network each costs more to call than to
    compute.
    """
    weights = (eta * signs) * s
    weights -= log_z
    xp.exp(weights, out=weights)
    towards = -share * signs[:, 0]
    pull = xp.einsum("kij,ij->kj", weights, d)
    if across is not None:
        pull = across(torch.as_tensor(pull))
        pull = pull.numpy() if xp is np else pull
    argument = 1.0 + towards * pull
    safe, below = floored(argument)
    count, weight = d.shape[0] * d.shape[1], 1.0 / (gamma * d.shape[1])
    barrier = xp.log(safe).sum() + below / BARRIER_FLOOR
    slope = (2.0 / count) * d
    slope -= xp.einsum("kij,kj->ij", weights, (weight * towards) / safe)
    return (d * d).sum() / count - weight * barrier, slope


class _RoundLoss(torch.autograd.Function):
    """The value of `round_loss`, and its gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, deviation: Tensor, error: Tensor, log_z: Tensor, eta: float, share: float, gamma: float, across: Any
    ) -> Tensor:
        if deviation.device.type == "cpu" and deviation.numel() <= SMALL:
            with np.errstate(all="ignore"):
                arrays = deviation.numpy(), error.numpy(), log_z.numpy(), SIGNS
                value, slope = _closed_form(np, _floored_array, *arrays, eta, share, gamma, across)
            found, gradient = deviation.new_tensor(value), torch.from_numpy(slope)
        else:
            signs = torch.arange(-1.0, 2.0, 2.0, device=deviation.device, dtype=deviation.dtype).view(2, 1, 1)
            tensors = deviation, error, log_z, signs
            # Mixed precision would make products in 16 bits of weights that are as small as 1/N.
            with torch.autocast(deviation.device.type, enabled=False):
                found, gradient = _closed_form(torch, _floored_tensor, *tensors, eta, share, gamma, across)
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None, None, None, None, None


def round_loss(
    deviation: Tensor,
    error: Tensor,
    log_z: Tensor,
    *,
    eta: float,
    population: int,
    bound: float,
    gamma: float,
    across: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`log_barrier_loss` of `game_rows`, as training calls it: in one step, differentiable by the deviation alone.

    The barrier is a logarithm of a sum over the batch. Where several processes share a batch, each has to see the sum
    over all of it, or it would train for another game with another number of processes.

    Args:
        deviation: d = f - g on the batch, shape (B, L).
        error: rows of S, shape (B, L).
        log_z: `log_normaliser` of all N rows, shape (L,).
        eta: step size of the game.
        population: N.
        bound: b = 2 max|g|.
        gamma: weight of the squared error against the barrier.
        across: mean over the processes that share a batch, each with as many of its rows; None for one process.

    Returns:
        The loss, shape (). With `across`, the mean over the processes of its gradient is that of the whole batch.
    """
    share = population / (len(deviation) * 2.0 * bound)
    loss: Tensor = _RoundLoss.apply(deviation, error, log_z, eta, share, gamma, across)
    return loss
