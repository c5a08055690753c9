"""Files of rows, one a sample: written by all processes to disjoint rows, named by one when they are whole."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bdistil import distributed

Array = np.ndarray[Any, np.dtype[Any]]
Storage = Literal["float32", "float16"]

# Bytes up to which a file is simply mapped.
LARGE = 1 << 28


class LargeRows:
    """Rows of a file that does not fit into memory, read and written as those of an array.

    By calls and not by a map: a process is charged for all that is mapped around a row, which is up to 2 MB of it.
    A scattered row costs 2 µs.

    Args:
        path: of the file.
        shape: (N, D).
        mode: ``r`` or ``r+``.
        dtype: of its numbers.
    """

    def __init__(self, path: Path, shape: tuple[int, int], mode: Literal["r", "r+"], dtype: Storage) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._width = shape[1] * self.dtype.itemsize
        self._handle = os.open(path, os.O_RDONLY if mode == "r" else os.O_RDWR)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        low, high, _ = rows.indices(len(self))
        out = np.empty((high - low, self.shape[1]), self.dtype)
        self._read(out.data.cast("B"), low)
        return out

    def _read(self, view: memoryview, row: int) -> None:
        place = row * self._width
        while len(view):
            count = os.preadv(self._handle, [view], place)
            if not count:
                raise OSError(f"{self.path} ends before row {-(-(place + len(view)) // self._width)}")
            view, place = view[count:], place + count

    def __setitem__(self, rows: slice, values: Array) -> None:
        low, high, _ = rows.indices(len(self))
        out = np.ascontiguousarray(np.broadcast_to(values, (high - low, self.shape[1])), self.dtype)
        view, place = out.data.cast("B"), low * self._width
        while len(view):
            count = os.pwrite(self._handle, view, place)
            view, place = view[count:], place + count

    def take(self, index: Array, axis: Literal[0]) -> Array:
        """Copies of scattered rows, (B, D).

        Raises:
            IndexError: a number is not in 0 … N-1.
        """
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"no such row among {len(self)}")
        out = np.empty((len(index), self.shape[1]), self.dtype)
        view = out.data.cast("B") if len(index) else memoryview(b"")
        for place, row in enumerate(index.tolist()):
            self._read(view[place * self._width : (place + 1) * self._width], row)
        return out


Rows = Array | LargeRows


def mapped(path: Path, shape: tuple[int, int], mode: Literal["r", "r+"] = "r", dtype: Storage = "float32") -> Rows:
    """A file as an array of a shape, read from the disk as it is touched."""
    if shape[0] * shape[1] * np.dtype(dtype).itemsize > LARGE:
        return LargeRows(path, shape, mode, dtype)
    # As a plain array: the subclass adds microseconds to every look-up.
    return np.asarray(np.memmap(path, np.dtype(dtype), mode, shape=shape))


def blank(path: Path, shape: tuple[int, int], dtype: Storage = "float32") -> Rows:
    """A file of zeros, open for writing. Its room is taken now: a full disk is an error here, not a crash later."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            size = shape[0] * shape[1] * np.dtype(dtype).itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    distributed.barrier()
    return mapped(path, shape, "r+", dtype)


def read(rows: Rows, low: int, high: int) -> Tensor:
    """A copy of a slice of rows as a float32 tensor: torch must not hold on to a read-only map."""
    part = rows[low:high]
    own = torch.from_numpy(part if part.flags.owndata else part.copy())
    return own.float()  # by torch, whose conversion from float16 is twenty times NumPy's


def name(beside: Path, path: Path) -> None:
    """Flushes a file that all processes wrote to, and gives it its name."""
    distributed.barrier()
    if distributed.rank() == 0:
        handle = os.open(beside, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
        os.replace(beside, path)
    distributed.barrier()


def whole(path: Path, shape: tuple[int, int], dtype: Storage = "float32") -> bool:
    """Is the file there, of the right size?"""
    return path.exists() and path.stat().st_size == shape[0] * shape[1] * np.dtype(dtype).itemsize


class FeatureCache:
    """Features (N, D) of recent students by sample index, for the links of later ones.

    With them a step of round t costs the same in round 2 and in round 20, and no earlier body runs in training.

    Args:
        folder: where the files are.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._open: dict[int, Rows] = {}
        self._next: Rows | None = None

    def _file(self, number: int) -> Path:
        return self.folder / f"features.{number:03d}.f32"

    @property
    def _beside(self) -> Path:
        return self.folder / "features.next.tmp"

    def begin(self, width: int) -> None:
        """Starts the file of a student with features of that width."""
        self._next = blank(self._beside, (self.samples, width))

    def write(self, low: int, features: Tensor) -> None:
        """Writes features (rows, D) from a row on."""
        assert self._next is not None
        self._next[low : low + len(features)] = features.detach().float().cpu().numpy()

    def keep(self, number: int) -> None:
        """Gives the file that was written its name."""
        assert self._next is not None
        self._next = None
        name(self._beside, self._file(number))

    def has(self, number: int, width: int) -> bool:
        """Are a student's features here, whole?"""
        return whole(self._file(number), (self.samples, width))

    def use(self, widths: dict[int, int]) -> None:
        """Opens the features of some students, by number and width; others are removed, as they can be made again."""
        self._open = {number: mapped(self._file(number), (self.samples, width)) for number, width in widths.items()}
        distributed.barrier()
        if distributed.rank() == 0:
            wanted = {self._file(number) for number in widths}
            for path in set(self.folder.glob("features.*")) - wanted:
                path.unlink(missing_ok=True)

    def rows(self, numbers: Sequence[int], index: np.ndarray[Any, Any]) -> list[Tensor]:
        """Features (B, D) of each of some students, in their order, on the CPU."""
        return [torch.from_numpy(self._open[number].take(index, 0)) for number in numbers]
