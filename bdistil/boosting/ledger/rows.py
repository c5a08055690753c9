"""Files with one row of numbers per sample; all processes write disjoint rows, then one of them renames the file."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.storage import files
from bdistil.utils import distributed

Array = np.ndarray[Any, np.dtype[Any]]
Storage = Literal["float32", "float16"]

# Size in bytes up to which a file is memory-mapped.
LARGE = 1 << 28
LARGEST_HALF = torch.finfo(torch.float16).max


class RowFile:
    """Rows (N, D) of a file, read and written as float32 tensors on the CPU.

    A file larger than `LARGE` is read and written by system calls, at 2 µs per scattered row, because memory-mapping
    would charge the process for up to 2 MB around each row.

    Args:
        path: path of an existing file.
        shape: (N, D).
        storage: dtype of the numbers in the file.
        writable: whether rows will be written.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], storage: Storage = "float32", *, writable: bool = False
    ) -> None:
        self.path, self.shape, self._dtype = path, shape, np.dtype(storage)
        self._row_bytes = shape[1] * self._dtype.itemsize
        self._map: Array | None = None
        self.in_memory = size_of(shape, storage) <= LARGE or not hasattr(os, "preadv")
        if self.in_memory:
            # As a plain array: the memmap subclass adds microseconds to every look-up.
            self._map = np.asarray(np.memmap(path, self._dtype, "r+" if writable else "r", shape=shape))
            return
        self._handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self._writing = threading.Lock()

    def read(self, low: int, high: int) -> Tensor:
        """Rows low … high - 1, a copy."""
        rows = np.empty((high - low, self.shape[1]), self._dtype)
        if self._map is None:
            self._transfer(os.preadv, rows, low)
        else:
            rows[:] = self._map[low:high]
        return torch.from_numpy(rows).float()

    def gather(self, index: Array) -> Tensor:
        """Scattered rows (B, D), a copy.

        Raises:
            UserError: a number is not in 0 … N-1.
        """
        if len(wrong := index[(index < 0) | (index >= self.shape[0])]):
            raise UserError(f"Expected each sample index to be in 0 … {self.shape[0] - 1}, got {int(wrong[0])}.")
        if self._map is not None:
            return torch.from_numpy(self._map.take(index, 0)).float()
        width = self._row_bytes
        content = bytearray().join([os.pread(self._handle, width, row * width) for row in index.tolist()])
        if len(content) != len(index) * width:
            raise self._ends_early()
        return torch.from_numpy(np.frombuffer(content, self._dtype).reshape(len(index), self.shape[1])).float()

    def write(self, low: int, rows: Tensor) -> Tensor:
        """Writes rows (B, D) from row `low` on; returns them as they will be read back.

        Raises:
            RunError: a number is too large for float16.
        """
        stored = self._stored(rows, low)
        if self._map is None:
            with self._writing:  # the system lets one thread write at a time, and others would spin
                self._transfer(os.pwritev, stored.numpy(), low)
        else:
            self._map[low : low + len(rows)] = stored.numpy()
        return stored.float()

    def _stored(self, rows: Tensor, low: int) -> Tensor:
        rows = rows.detach().float().cpu().contiguous()
        if self._dtype == np.float32:
            return rows
        largest, sample = rows.abs().amax(1).max(0)
        if largest > LARGEST_HALF:
            raise RunError(
                f"Expected numbers up to {LARGEST_HALF:.0f} in {self.path}, which is stored as float16, got "
                f"{float(largest):.4g} at sample {low + int(sample)}. Set `storage` to 'float32' in a new run."
            )
        return rows.half()

    def _transfer(self, call: Callable[..., int], rows: Array, low: int) -> None:
        view, place = rows.reshape(-1).view(np.uint8).data, low * self._row_bytes
        while view:
            count = call(self._handle, [view], place)
            if not count:
                raise self._ends_early()
            view, place = view[count:], place + count

    def _ends_early(self) -> OSError:
        return OSError(f"{self.path} ends before row {self.shape[0]}")


def size_of(shape: tuple[int, int], storage: Storage = "float32") -> int:
    """Size in bytes of a file of rows (N, D)."""
    return shape[0] * shape[1] * np.dtype(storage).itemsize


def allocate(path: Path, shape: tuple[int, int], storage: Storage = "float32") -> RowFile:
    """Creates a file of zeros and reserves its space, so that a full disk is an error here and not a crash later."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            size = size_of(shape, storage)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                _reserve(file.fileno(), size)
    distributed.barrier()
    return RowFile(path, shape, storage, writable=True)


def _reserve(handle: int, size: int) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:  # some file systems do not support this call
        if error.errno not in files.UNSUPPORTED:
            raise


def publish(beside: Path, path: Path) -> None:
    """Calls `storage.files.publish` for a file that all processes have written."""
    files.sync(beside)  # on a network disk, each host flushes its own rows
    distributed.barrier()
    if distributed.rank() == 0:
        files.publish(beside, path)
    distributed.barrier()


def is_complete(path: Path, shape: tuple[int, int], storage: Storage = "float32") -> bool:
    """Whether the file exists and has the size of rows (N, D)."""
    return path.exists() and path.stat().st_size == size_of(shape, storage)
