"""Sums over all samples, block by block: the same bits whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.rows import Array, Rows
from bdistil.boosting.ledger.units import Units
from bdistil.errors import RunError
from bdistil.functional.boosting import game_rows, log_normaliser
from bdistil.metrics.quality import Task
from bdistil.utils import distributed

# Rows that are scored at once; whole blocks go to one process, whatever the number of processes.
BLOCK = 512


def measured_units(target: Rows, task: Task) -> Units:
    """Units of the rows (N, L) that the processes have written, so that a number of the ledger has rms 1.

    Raises:
        RunError: all rows are the same.
    """
    samples, outputs = target.shape
    mean = torch.zeros(outputs, dtype=torch.float64)
    if task == "regression":
        mean = over_blocks(target, lambda rows: rows) / samples
    squares = over_blocks(target, lambda rows: (rows - mean).square()) / samples
    if task == "regression":
        sd = squares.sqrt().where(squares.sqrt() > 1e-6 * mean.abs(), 0.0)  # what rounding leaves of a constant output
        same, units = bool((sd == 0).all()), Units(tuple(sd.where(sd > 0, 1.0).tolist()), tuple(mean.tolist()))
    else:
        same, units = bool((squares == 0).all()), Units(float(squares.mean()) ** 0.5)
    if same:
        raise RunError("The teacher gives the same answer for every sample: there is nothing to distil.")
    return units


def over_blocks(target: Rows, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all samples of a function of rows (rows, L), shape (L,) float64, the same bits in every process."""
    samples, outputs = target.shape
    sums = block_sums(samples, outputs)
    for low, high in distributed.my_blocks(len(target), BLOCK):
        sums[low // BLOCK] = of(torch.from_numpy(target[low:high].astype(np.float64))).sum(0)
    return joined(sums)


def block_sums(samples: int, columns: int) -> Array:
    """Zeros for a sum of every block: added up in one order, whatever process made it, they give the same bits."""
    return np.zeros((-(-samples // BLOCK), columns))


def joined(sums: Array) -> Tensor:
    """Sum over all blocks (blocks, L), of which each process has made its own, shape (L,) float64."""
    return distributed.all_sum(torch.from_numpy(sums)).sum(0)


def joined_normalisers(normalisers: Array) -> Tensor:
    """log Z (L,) of those of every block (blocks, L), of which each process has made its own; -inf are the others'."""
    own = np.where(normalisers > -np.inf, normalisers, 0.0)
    return torch.logsumexp(distributed.all_sum(torch.from_numpy(own)), 0)


# Rows that are added up in float32, before float64 takes their sum.
GROUP = 16


def column_sum(rows: Tensor) -> Tensor:
    """Sum of rows (B, L) in float64, (L,), at the cost of one in float32: only of a few rows the sum is in that."""
    whole = len(rows) // GROUP * GROUP
    groups = rows[:whole].view(-1, GROUP, rows.shape[1]).sum(1)
    return torch.cat((groups, rows[whole:])).sum(0, dtype=torch.float64)


def square_sum(rows: Tensor, scratch: Tensor) -> Tensor:
    """Sum of squares: of a column in float32, of all in float64. By columns, as other sums depend on the threads."""
    return torch.mul(rows, rows, out=scratch).sum(0).sum(dtype=torch.float64)


# exp(x) = 2^(x LOG2E), which torch has in half the time on some processors.
LOG2E = math.log2(math.e)


def normaliser_sums(error: Tensor, eta: float, rise: Tensor, fall: Tensor) -> Tensor:
    """`functional.log_normaliser` of some rows of a block, (L,) float64, in a third of the time.

    Args:
        error: rows of S (B, L), B up to `BLOCK`.
        eta: step size of the game.
        rise: memory for (B, L).
        fall: the same.
    """
    torch.mul(error, eta * LOG2E, out=rise).exp2_()
    total = column_sum(torch.reciprocal(rise, out=fall).add_(rise))
    if bool(total.isfinite().all()):
        return total.log()
    return log_normaliser(error, eta, torch.float64)  # safe at any size of eta S


def margin_sums(error: Tensor, deviation: Tensor, log_z: Tensor, eta: float, rise: Tensor, fall: Tensor) -> Tensor:
    """What some rows of a block add to `functional.margins`: sum_i (K+_ij - K-_ij) d_ij over them.

    Args:
        error: rows of S before the student (B, L), B up to `BLOCK`.
        deviation: d = f - g of the student, shape (B, L).
        log_z: `log_normaliser` of all N rows, shape (L,) float64.
        eta: step size of the game.
        rise: memory for (B, L).
        fall: the same.

    Returns:
        Shape (L,) float64.
    """
    torch.mul(error, eta * LOG2E, out=rise).exp2_()
    total = column_sum(torch.reciprocal(rise, out=fall).sub_(rise).mul_(deviation))
    if bool(total.isfinite().all()):
        return total * torch.exp(-log_z)
    up, down = game_rows(error, log_z, eta)
    return ((up - down) * deviation).sum(0, dtype=torch.float64)


LOWER = "A lower learning rate or float32 precision is the usual cure."
AGAIN = "Remove that file: it is made again."


def largest_finite(rows: Tensor, low: int, what: str = "the student's logits", cure: str = LOWER) -> Tensor:
    """Largest absolute value of rows from `low` on.

    Raises:
        RunError: one is NaN or infinite; the first such sample is named.
    """
    low_end, high_end = torch.aminmax(rows)  # either is NaN where a number is
    largest = torch.maximum(-low_end, high_end)
    if not torch.isfinite(largest):
        refuse_nonfinite(rows, low, what, cure)
    return largest


def refuse_nonfinite(rows: Tensor, low: int, what: str, cure: str = LOWER) -> None:
    """Refuses rows from `low` on that hold NaN or infinity.

    Raises:
        RunError: names the first such sample.
    """
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(-1).nonzero()[0, 0])
        raise RunError(
            f"NaN or infinity in {what}, first at sample {low + bad}. Nothing of this round was committed; the rounds "
            f"before it are intact. {cure}"
        )
