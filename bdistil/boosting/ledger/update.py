"""S of the next version and what it says of a student, a few rows at a time; compiled where Numba is installed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.large_rows import LargeRows
from bdistil.boosting.ledger.reductions import AGAIN, LOG2E, largest_finite, margin_sums, normaliser_sums, square_sum
from bdistil.utils import distributed

WITHOUT_NUMBA = (
    "Numba is not at hand: with `storage: int16` every commit of a round takes several times as long. "
    "It comes with pip install 'bdistil[int16]'."
)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sums:
    """What some rows add to those of all.

    Attributes:
        margins: shape (L,) float64.
        squares: of the errors before and after; before the first student those of g.
        largest: largest |S| after.
        log_normaliser: of their new S, shape (L,) float64.
    """

    margins: Array
    squares: tuple[float, float]
    largest: float
    log_normaliser: Array


class Scratch:
    """Memory for some rows that is used again and again: asking for it anew costs as much as the arithmetic on it.

    Args:
        rows: as many as are worked on at once.
        columns: L.
        storage: of the files.
    """

    def __init__(self, rows: int, columns: int, storage: row_files.Storage) -> None:
        self.columns = columns
        self.kept = [np.empty(rows, row_files.row_type(storage, columns)) for _ in range(3)]
        self.flat = [row_files.flat(kept) for kept in self.kept] if storage == "int16" else []
        self.numbers = [torch.empty(rows, columns) for _ in range(5)]

    def fetch(self, table: row_files.Rows, low: int, high: int, place: int) -> Array:
        """Rows low … high - 1 of a table as they are on the disk, in place 0 or 1."""
        part = self.kept[place][: high - low]
        if isinstance(table, LargeRows):
            table.fill(part, low)
        else:
            np.copyto(part, table[low:high])
        return part

    def read(self, table: row_files.Rows, low: int, high: int, place: int) -> Tensor:
        """The same, float32."""
        return row_files.decoded(self.fetch(table, low, high, place), self.numbers[place])


class Pass:
    """A pass over rows of g and S with the step size eta.

    Args:
        g: the teacher's logits (N, L).
        s: running error S (N, L).
        eta: step size of the game.
        storage: of both on the disk.
        log_z: of S, shape (L,) float64, where it is known.
        first: no student is in S yet.
    """

    def __init__(
        self,
        g: row_files.Rows,
        s: row_files.Rows,
        eta: float,
        storage: row_files.Storage,
        log_z: Tensor | None = None,
        *,
        first: bool = False,
    ) -> None:
        self.g, self.s, self.eta, self.storage, self.first = g, s, eta, storage, first
        self.log_z = torch.zeros(0) if log_z is None else log_z
        self.scale, self.weight = np.float32(eta * LOG2E), torch.exp(-self.log_z).numpy()
        # Of a small ledger the numbers are the same wherever it is read; of a large one they are quick.
        large = storage == "int16" and isinstance(s, LargeRows)
        self.kernels: ModuleType | None = row_files.compiled() if large else None
        if large and not self.kernels and distributed.rank() == 0:
            warnings.warn(WITHOUT_NUMBA, stacklevel=2)

    def log_normaliser(self, low: int, high: int, scratch: Scratch, what: str) -> Array:
        """log Z of some rows of S, shape (L,) float64.

        Raises:
            RunError: S holds NaN or infinity.
        """
        if self.kernels:
            found, _ = np.empty(scratch.columns), scratch.fetch(self.s, low, high, 0)
            if self.kernels.log_normaliser(scratch.flat[0][: high - low], self.scale, found):
                return found
        error = scratch.read(self.s, low, high, 0)
        largest_finite(error, low, what, AGAIN)
        return normaliser_sums(error, self.eta, *(x[: len(error)] for x in scratch.numbers[1:3])).numpy()

    def advance(self, low: int, rows: Tensor, target: row_files.Rows, scratch: Scratch) -> Sums:
        """Writes S of some rows.

        Args:
            low: the first row.
            rows: the student's logits, shape (B, L) float32.
            target: of the rows to come.
            scratch: of this thread.

        Raises:
            RunError: a logit is NaN or infinite.
        """
        if self.kernels and (sums := self._compiled(low, rows, target, scratch)):
            return sums
        high = low + len(rows)
        new, other, third = (numbers[: len(rows)] for numbers in scratch.numbers[2:])
        g, s = (scratch.read(table, low, high, place) for place, table in enumerate((self.g, self.s)))
        before = square_sum(g if self.first else s, other)
        deviation = torch.sub(rows, g, out=g)
        torch.add(s, deviation, out=new)
        largest, after = largest_finite(new, low), square_sum(new, other)
        margins = margin_sums(s, deviation, self.log_z, self.eta, other, third)
        target[low:high], stored = row_files.encoded(new, self.storage, other)
        normaliser = normaliser_sums(stored, self.eta, s, deviation)
        return Sums(margins.numpy(), (float(before), float(after)), float(largest), normaliser.numpy())

    def _compiled(self, low: int, rows: Tensor, target: row_files.Rows, scratch: Scratch) -> Sums | None:
        """The same in one pass, where no number is extreme. A call of torch or NumPy costs as much as 50 rows here."""
        assert self.kernels
        high, margins, normaliser = low + len(rows), np.empty(scratch.columns), np.empty(scratch.columns)
        for place, table in enumerate((self.g, self.s)):
            scratch.fetch(table, low, high, place)
        g, s, new = (flat[: len(rows)] for flat in scratch.flat)
        well, before, after, largest = self.kernels.advance(
            g, s, rows.contiguous().numpy(), self.scale, self.weight, self.first, new, margins
        )
        if not well or not self.kernels.log_normaliser(new, self.scale, normaliser):
            return None
        target[low:high] = scratch.kept[2][: len(rows)]
        return Sums(margins, (before, after), largest, normaliser)
