"""Files of float32 rows, one a sample: written by all processes to disjoint rows, named by one when they are whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bdistil import distributed

Rows = np.ndarray[Any, np.dtype[np.float32]]


def mapped(path: Path, shape: tuple[int, int], mode: Literal["r", "r+"] = "r") -> Rows:
    """A file as an array of a shape, read from the disk as it is touched."""
    # As a plain array: the subclass adds microseconds to every look-up.
    return np.asarray(np.memmap(path, np.float32, mode, shape=shape))


def blank(path: Path, shape: tuple[int, int]) -> Rows:
    """A file of zeros, open for writing. Its room is taken now: a full disk is an error here, not a crash later."""
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            size = shape[0] * shape[1] * 4
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    distributed.barrier()
    return mapped(path, shape, "r+")


def name(beside: Path, path: Path) -> None:
    """Flushes a file that all processes wrote to, and gives it its name."""
    distributed.barrier()
    if distributed.rank() == 0:
        handle = os.open(beside, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
        os.replace(beside, path)
    distributed.barrier()


def whole(path: Path, shape: tuple[int, int]) -> bool:
    """Is the file there, of the right size?"""
    return path.exists() and path.stat().st_size == shape[0] * shape[1] * 4


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
