"""Sums over rows of a ledger; joined over all blocks, they are bitwise identical for any number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.rows import Array
from bdistil.errors import RunError
from bdistil.functional.boosting import game_rows, log_normaliser
from bdistil.utils import distributed

# Rows per block. A block is never split between processes.
BLOCK = 512
# Rows summed in float32 before their sum is added in float64.
GROUP = 16
# exp(x) = 2^(x LOG2E); exp2 takes half the time of exp in torch on some processors.
LOG2E = math.log2(math.e)

LOWER_RATE = "A lower learning rate or float32 precision is the usual cure."
REMOVE_FILE = "Remove that file: it is computed again."


@dataclass(frozen=True)
class RowSums:
    """Contribution of some rows to the sums over all samples when a student is added.

    Attributes:
        margins: contribution to the margins, shape (L,) float64.
        squares: sums of the squared errors before and after; before the first student, of g.
        largest: max|S| after.
        log_normaliser: log-normaliser of S after, shape (L,) float64.
    """

    margins: Array
    squares: tuple[float, float]
    largest: float
    log_normaliser: Array


def block_sums(samples: int, columns: int, fill: float = 0.0) -> Array:
    """Table (blocks, columns) for the sums of each block, which `joined` adds in the same order in all processes."""
    return np.full((-(-samples // BLOCK), columns), fill)


def joined(sums: Array) -> Tensor:
    """Sum over all blocks (blocks, L), shape (L,) float64. Each process has filled in its own blocks."""
    return distributed.all_sum(torch.from_numpy(sums)).sum(0)


def joined_normalisers(normalisers: Array) -> Tensor:
    """log Z (L,) from those of the blocks (blocks, L); the blocks of other processes hold -inf."""
    own = np.where(normalisers > -np.inf, normalisers, 0.0)
    return torch.logsumexp(distributed.all_sum(torch.from_numpy(own)), 0)


def column_sum(rows: Tensor) -> Tensor:
    """Sum over rows (B, L) in float64, (L,); groups of rows are summed in float32, which costs no more than float32."""
    whole = len(rows) // GROUP * GROUP
    groups = rows[:whole].view(-1, GROUP, rows.shape[1]).sum(1)
    return torch.cat((groups, rows[whole:])).sum(0, dtype=torch.float64)


def square_sum(rows: Tensor) -> Tensor:
    """Sum of squares: per column in float32, over columns in float64; independent of the number of threads."""
    return rows.square().sum(0).sum(dtype=torch.float64)


def normaliser_sums(error: Tensor, eta: float) -> Tensor:
    """`functional.log_normaliser` of some rows of a block, (L,) float64, three times as fast.

    Args:
        error: rows of S (B, L), B up to `BLOCK`.
        eta: step size of the game.
    """
    rise = (error * (eta * LOG2E)).exp2_()
    total = column_sum(rise.reciprocal().add_(rise))
    if bool(total.isfinite().all()):
        return total.log()
    return log_normaliser(error, eta, torch.float64)  # safe at any size of eta S


def margin_sums(error: Tensor, deviation: Tensor, log_z: Tensor, eta: float) -> Tensor:
    """Contribution of some rows of a block to `functional.margins`: sum_i (K+_ij - K-_ij) d_ij over them.

    Args:
        error: rows of S before the student (B, L), B up to `BLOCK`.
        deviation: d = f - g of the student, shape (B, L).
        log_z: `log_normaliser` of all N rows, shape (L,) float64.
        eta: step size of the game.

    Returns:
        Shape (L,) float64.
    """
    rise = (error * (eta * LOG2E)).exp2_()
    total = column_sum(rise.reciprocal().sub_(rise).mul_(deviation))
    if bool(total.isfinite().all()):
        return total * torch.exp(-log_z)
    up, down = game_rows(error, log_z, eta)
    return ((up - down) * deviation).sum(0, dtype=torch.float64)


def largest_finite(rows: Tensor, low: int, what: str = "the student's logits", cure: str = LOWER_RATE) -> Tensor:
    """Largest absolute value of the rows that begin with sample `low`.

    Raises:
        RunError: a value is NaN or infinite; names the first such sample.
    """
    low_end, high_end = torch.aminmax(rows)  # both are NaN if any value is
    largest = torch.maximum(-low_end, high_end)
    if not torch.isfinite(largest):
        bad = int((~torch.isfinite(rows)).any(-1).nonzero()[0, 0])
        raise RunError(
            f"NaN or infinity in {what}, first at sample {low + bad}. Nothing of this round was committed; the rounds "
            f"before it are intact. {cure}"
        )
    return largest
