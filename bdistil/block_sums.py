"""Sums over all samples, block by block: the same bits whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bdistil import distributed
from bdistil.errors import RunError
from bdistil.row_files import Rows
from bdistil.units import Task, Units

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
    return distributed.all_sum(sums).sum(0)


def block_sums(samples: int, columns: int) -> Tensor:
    """Zeros for a sum of every block: added up in one order, whatever process made it, they give the same bits."""
    return torch.zeros(-(-samples // BLOCK), columns, dtype=torch.float64)


def joined_normalisers(normalisers: Tensor) -> Tensor:
    """log Z (L,) of those of every block (blocks, L), of which each process has made its own; -inf are the others'."""
    return torch.logsumexp(distributed.all_sum(normalisers.where(normalisers > -torch.inf, 0.0)), 0)


def square_sum(rows: Tensor) -> Tensor:
    """Sum of squares: of a row in float32, of the rows in float64."""
    return rows.square().sum(1).sum(dtype=torch.float64)


LOWER = "A lower learning rate or float32 precision is the usual cure."
AGAIN = "Remove that file: it is made again."


def largest_finite(rows: Tensor, low: int, what: str = "the student's logits", cure: str = LOWER) -> Tensor:
    """Largest absolute value of rows from `low` on.

    Raises:
        RunError: one is NaN or infinite; the first such sample is named.
    """
    largest = rows.abs().amax()
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
