"""Files of rows, one a sample: written by all processes to disjoint rows, named by one when they are whole."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.large_rows import LargeRows
from bdistil.storage.files import publish
from bdistil.utils import distributed

Array = np.ndarray[Any, np.dtype[Any]]
Storage = Literal["float32", "int16"]

# Bytes up to which a file is simply mapped.
LARGE = 1 << 28
# Steps from 0 to the largest number of a row of 16-bit numbers; the smallest one, of rows that are as good as 0.
STEPS, SMALLEST_STEP = 32767, 1e-30
# Numbers from which on it is worth while to load what decodes them in one pass.
MANY = 1 << 18
# Seconds after which what was written of a large file goes to the disk.
FLUSH_SECONDS = 0.1


def row_type(storage: Storage, columns: int) -> np.dtype[Any]:
    """What a row is on the disk: numbers, or how often it holds a step whose size is its own.

    The error of int16 is half a step, 1.5e-5 of the row's largest number, everywhere. That of float16 grows with the
    number, to 16 times as much where the weights of the game, exp(eta S), are most sensitive to it.
    """
    if storage == "float32":
        return np.dtype((np.float32, (columns,)))
    return np.dtype([("step", np.float32), ("count", np.int16, (columns,))])


def encoded(rows: Tensor, storage: Storage, scratch: Tensor | None = None) -> tuple[Array, Tensor]:
    """Rows (B, D) float32 as they are kept on the disk, and as they will be read."""
    if storage == "float32":
        return rows.numpy(), rows
    counts = torch.empty_like(rows) if scratch is None else scratch[: len(rows)]
    step = torch.abs(rows, out=counts).amax(1, keepdim=True) / STEPS
    torch.mul(rows, step.clamp(min=SMALLEST_STEP).reciprocal_(), out=counts).round_()
    out = np.empty(len(rows), row_type(storage, rows.shape[1]))
    out["step"] = step[:, 0].numpy()
    torch.from_numpy(out["count"]).copy_(counts)
    return out, counts.mul_(step)


def decoded(rows: Array, scratch: Tensor | None = None) -> Tensor:
    """Rows (B, D) float32 of what is kept on the disk; float32 shares its memory."""
    if rows.dtype.names is None:
        return torch.from_numpy(rows)
    counts = torch.from_numpy(rows["count"])
    numbers = torch.empty(counts.shape) if scratch is None else scratch[: len(rows)]
    if counts.numel() >= MANY and (kernels := compiled()):
        kernels.decode(flat(rows), numbers.numpy())
        return numbers
    return numbers.copy_(counts).mul_(torch.from_numpy(rows["step"].copy())[:, None])


def flat(rows: Array) -> Array:
    """Rows of 16-bit numbers as (B, 2 + D) int16, of which the first two are the step."""
    return rows.view(np.int16).reshape(len(rows), -1)


@functools.cache
def compiled() -> ModuleType | None:
    """What works on rows of 16-bit numbers in one pass, where Numba is installed and works: some 3 s to compile."""
    try:
        from bdistil.boosting.ledger import int16_kernels as row_kernels

        row_kernels.trial()
    except ImportError:
        return None
    except Exception as error:  # another release, a broken LLVM: all goes on without it
        warnings.warn(f"Numba does not work here, rows are read without it: {error!r}", stacklevel=2)
        return None
    return row_kernels


Rows = Array | LargeRows


def mapped(path: Path, shape: tuple[int, int], mode: Literal["r", "r+"] = "r", dtype: Storage = "float32") -> Rows:
    """A file as an array of a shape, read from the disk as it is touched."""
    if size_of(shape, dtype) > LARGE:
        return LargeRows(path, shape, mode, row_type(dtype, shape[1]))
    # As a plain array: the subclass adds microseconds to every look-up.
    return np.asarray(np.memmap(path, row_type(dtype, shape[1]), mode, shape=shape[:1]))


def size_of(shape: tuple[int, int], dtype: Storage) -> int:
    """Bytes of a file."""
    return shape[0] * row_type(dtype, shape[1]).itemsize


def blank(path: Path, shape: tuple[int, int], dtype: Storage = "float32") -> Rows:
    """A file of zeros, open for writing. Its room is taken now: a full disk is an error here, not a crash later."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            size = size_of(shape, dtype)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    distributed.barrier()
    return mapped(path, shape, "r+", dtype)


def read_into(out: Tensor, table: Rows, low: int, some: Array) -> None:
    """Reads rows from `low` on as numbers.

    Args:
        out: memory for them, (B, D) float32.
        table: of rows.
        low: the first row.
        some: memory for a few rows, that stay in the processor's cache until they are decoded.
    """
    if isinstance(table, LargeRows) and table.kind.names is None:
        table.fill(out.numpy(), low)
    elif (
        not isinstance(table, LargeRows)
        or not (kernels := compiled())
        or not kernels.read(table.handle, low, flat(some), out.numpy())
    ):
        out.copy_(decoded(table[low : low + len(out)].copy()))  # torch must not hold on to a read-only map


def taken(table: Rows, index: Array) -> Tensor:
    """Scattered rows as numbers, (B, D) float32.

    Raises:
        IndexError: a number is not in 0 … N-1.
    """
    if len(index) and index.min() < 0:  # NumPy would count from the end
        raise IndexError("no such row")
    if isinstance(table, LargeRows) and table.kind.names and (kernels := compiled()):
        numbers, row = torch.empty(len(index), table.shape[1]), np.empty((1, table.shape[1] + 2), np.int16)
        places = index.astype(np.int64, order="C", casting="safe", copy=False)
        if kernels.take(table.handle, places, row, numbers.numpy()):
            return numbers
    return decoded(table.take(index, 0))


def name(beside: Path, path: Path) -> None:
    """Flushes a file that all processes wrote to, and gives it its name."""
    distributed.barrier()
    if distributed.rank() == 0:
        publish(beside, path)
    distributed.barrier()


@contextmanager
def flushed_meanwhile(rows: Rows) -> Iterator[None]:
    """Has the disk write a large file while its rows are still being made, so that `name` has little to wait for."""
    if not isinstance(rows, LargeRows):
        yield
        return
    over = threading.Event()

    def flush() -> None:
        while not over.wait(FLUSH_SECONDS):
            rows.flush()
        rows.flush()  # of each host its own: one of them gives the file its name

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            over.set()
        flushing.result()  # an error of the disk is reported once, and may have been reported here


def whole(path: Path, shape: tuple[int, int], dtype: Storage = "float32") -> bool:
    """Is the file there, of the right size?"""
    return path.exists() and path.stat().st_size == size_of(shape, dtype)
