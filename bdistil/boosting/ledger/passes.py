"""Passes over all rows of a ledger: scaling of the teacher's logits, adding a student, normalisers of the game."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.records import RoundEvidence, Units
from bdistil.boosting.ledger.reductions import (
    BLOCK,
    REMOVE_FILE,
    RowSums,
    block_sums,
    joined,
    joined_normalisers,
    largest_finite,
    margin_sums,
    normaliser_sums,
    square_sum,
)
from bdistil.boosting.ledger.rows import RowFile
from bdistil.errors import RunError
from bdistil.metrics.quality import Task
from bdistil.utils import distributed
from bdistil.utils.threads import ordered_map

# Numbers processed at once. Arrays of this size are reused by the allocator; twice as large ones need fresh pages.
PIECE = 1 << 18
# Maximum number of threads of a pass over a file that is not memory-mapped; more would wait for the disk.
THREADS = 4


def measure_units(logits: RowFile, task: Task) -> Units:
    """Units in which the rows (N, L) have rms 1: per output in a regression, over all outputs otherwise.

    Classification logits are centred per sample before they are written; other outputs have an offset.

    Raises:
        RunError: all rows are equal.
    """
    samples, outputs = logits.shape
    mean = torch.zeros(outputs, dtype=torch.float64)
    if task != "classification":
        mean = _sum_over_blocks(logits, lambda rows: rows) / samples
    squares = _sum_over_blocks(logits, lambda rows: (rows - mean).square()) / samples
    if task == "regression":
        sd = squares.sqrt().where(squares.sqrt() > 1e-6 * mean.abs(), 0.0)  # rounding errors of a constant output
        constant, units = bool((sd == 0).all()), Units(tuple(sd.where(sd > 0, 1.0).tolist()), tuple(mean.tolist()))
    else:
        scale, offset = float(squares.mean()) ** 0.5, None if task == "classification" else tuple(mean.tolist())
        constant, units = scale <= 1e-6 * float(mean.abs().max()), Units(scale, offset)
    if constant:
        raise RunError("The teacher gives the same answer for every sample: there is nothing to distil.")
    return units


def _sum_over_blocks(table: RowFile, function: Callable[[Tensor], Tensor]) -> Tensor:
    sums = block_sums(*table.shape)
    for low, high in distributed.my_blocks(table.shape[0], BLOCK):
        sums[low // BLOCK] = function(table.read(low, high).double()).sum(0)
    return joined(sums)


def scale_rows(logits: RowFile, target: RowFile, units: Units) -> float:
    """Writes the rows in units of the ledger; returns the largest absolute value."""
    scale, offset, largest = torch.tensor(units.scale), torch.tensor(units.offset or 0.0), torch.zeros(())
    for low, high in distributed.my_blocks(logits.shape[0], BLOCK):
        rows = (logits.read(low, high) - offset) / scale
        largest = torch.maximum(largest, rows.abs().amax())
        target.write(low, rows)
    return float(distributed.all_max(largest))


@dataclass(frozen=True)
class GameState:
    """g, S and the normaliser of the game before a new student.

    Attributes:
        g: the teacher's logits (N, L).
        s: running error S (N, L).
        students: number of students in S.
        eta: step size of the game.
        log_z: log-normaliser of S, shape (L,) float64.
    """

    g: RowFile
    s: RowFile
    students: int
    eta: float
    log_z: Tensor


def advance(
    state: GameState, target: RowFile, logits: Iterable[tuple[int, Tensor]], smallest: float
) -> tuple[RoundEvidence, Tensor]:
    """Writes S with a new student, in one pass.

    Args:
        state: state before the student.
        target: file of the new S.
        logits: (first row, student logits in units of the ledger (rows, L)) of the rows of this process.
        smallest: smallest margin that counts as met.

    Returns:
        The evidence on the student, and log Z of the new S, shape (L,) float64.

    Raises:
        RunError: a logit is NaN or infinite; names the first such sample.
    """
    samples, outputs = target.shape
    margins, squares = block_sums(samples, outputs), block_sums(samples, 2)
    normalisers, largest = block_sums(samples, outputs, -np.inf), 0.0
    size = _piece_rows(outputs)
    pieces = ((low + start, rows[start : start + size]) for low, rows in logits for start in range(0, len(rows), size))
    for block, sums in ordered_map(
        lambda piece: _advance_rows(state, target, *piece), pieces, threads=_threads(target)
    ):
        margins[block] += sums.margins
        squares[block] += sums.squares
        largest = max(largest, sums.largest)
        np.logaddexp(normalisers[block], sums.log_normaliser, out=normalisers[block])
    margin = joined(margins)
    rms = (joined(squares) / (samples * outputs)).sqrt()
    evidence = RoundEvidence(
        margin_share=float((margin >= smallest).double().mean()),
        margin_min=float(margin.min()),
        rms_before=float(rms[0]) / max(state.students, 1),
        rms_after=float(rms[1]) / (state.students + 1),
        sup_after=float(distributed.all_max(torch.tensor(largest))) / (state.students + 1),
    )
    return evidence, joined_normalisers(normalisers)


def _advance_rows(state: GameState, target: RowFile, low: int, logits: Tensor) -> tuple[int, RowSums]:
    """Writes S of the rows from `low` on; returns their block and their contribution to its sums."""
    g, s = state.g.read(low, low + len(logits)), state.s.read(low, low + len(logits))
    deviation = logits.detach().float().cpu() - g
    new = s + deviation
    before, largest, after = square_sum(s if state.students else g), largest_finite(new, low), square_sum(new)
    margins = margin_sums(s, deviation, state.log_z, state.eta)
    normaliser = normaliser_sums(target.write(low, new), state.eta)
    sums = RowSums(margins.numpy(), (float(before), float(after)), float(largest), normaliser.numpy())
    return low // BLOCK, sums


def log_normaliser(s: RowFile, eta: float) -> Tensor:
    """log Z of S, shape (L,) float64, identical to the bit in all processes; each process reads its own blocks.

    Raises:
        RunError: S contains NaN or infinity.
    """
    samples, outputs = s.shape
    normalisers, size = block_sums(samples, outputs, -np.inf), _piece_rows(outputs)
    for low, high in distributed.my_blocks(samples, BLOCK):
        for start in range(low, high, size):
            rows = s.read(start, min(start + size, high))
            largest_finite(rows, start, f"the ledger ({s.path})", REMOVE_FILE)
            own = normaliser_sums(rows, eta).numpy()
            np.logaddexp(normalisers[low // BLOCK], own, out=normalisers[low // BLOCK])
    return joined_normalisers(normalisers)


def _piece_rows(outputs: int) -> int:
    return min(max(1, PIECE // outputs), BLOCK)


def _threads(table: RowFile) -> int:
    return 0 if table.in_memory else min(THREADS, torch.get_num_threads())
