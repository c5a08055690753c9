"""Rows of a file that does not fit into memory."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class LargeRows:
    """Rows of a file that does not fit into memory, read and written as those of an array.

    By calls and not by a map: a process is charged for all that is mapped around a row, which is up to 2 MB of it.
    A scattered row costs 2 µs.

    Args:
        path: of the file.
        shape: (N, D).
        mode: ``r`` or ``r+``.
        kind: of a row.
    """

    def __init__(self, path: Path, shape: tuple[int, int], mode: Literal["r", "r+"], kind: np.dtype[Any]) -> None:
        self.path, self.shape, self.kind = path, shape, kind
        self._width = self.kind.itemsize
        self.handle = os.open(path, os.O_RDONLY if mode == "r" else os.O_RDWR)
        weakref.finalize(self, os.close, self.handle)
        self._writes = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        low, high, _ = rows.indices(len(self))
        out = np.empty(high - low, self.kind)
        self.fill(out, low)
        return out

    def fill(self, out: Array, low: int) -> None:
        """Reads the rows from `low` on into memory that is there."""
        high = low + len(out)
        view, place = out.data.cast("B") if len(out) else memoryview(b""), low * self._width
        while len(view):
            count = os.preadv(self.handle, [view], place)
            if not count:
                raise OSError(f"{self.path} ends before row {high}")
            view, place = view[count:], place + count

    def __setitem__(self, rows: slice, values: Array) -> None:
        low, high, _ = rows.indices(len(self))
        out = np.ascontiguousarray(values, self.kind.base)
        assert len(out) == high - low
        view, place = out.data.cast("B"), low * self._width
        with self._writes:  # the system lets one in at a time; here the others sleep, there they spin
            while len(view):
                count = os.pwrite(self.handle, view, place)
                view, place = view[count:], place + count

    def flush(self) -> None:
        """Waits until what was written so far is on the disk."""
        os.fsync(self.handle)

    def take(self, index: Array, axis: Literal[0]) -> Array:
        """Copies of scattered rows, (B, D).

        Raises:
            IndexError: a number is not in 0 … N-1.
        """
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"no such row among {len(self)}")
        rows = [os.pread(self.handle, self._width, place) for place in (index * self._width).tolist()]
        short = [row for row, content in zip(index.tolist(), rows, strict=True) if len(content) < self._width]
        if short:
            raise OSError(f"{self.path} ends before row {short[0] + 1}")
        return np.frombuffer(bytearray().join(rows), self.kind)
