"""Sketches of all samples as they were when the teacher was evaluated, beside its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.rows import Array, allocate, is_complete, publish


class SampleSketches:
    """Sketches of x and y, (N, 2) float64 by sample index, on disk.

    Args:
        folder: of the file.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._open: Array | None = None
        self._next: Array | None = None  # while it is written

    @property
    def _file(self) -> Path:
        return self.folder / "samples.f64"

    @property
    def _room(self) -> tuple[int, int]:
        return self.samples, 4  # a row of two float64 takes the space of four float32

    def _map(self, path: Path, mode: str) -> Array:
        return np.asarray(np.memmap(path, np.float64, mode, shape=(self.samples, 2)))  # type: ignore[call-overload]

    def begin(self) -> None:
        """Creates the file."""
        beside = self.folder / "samples.next.tmp"
        allocate(beside, self._room)
        self._next = self._map(beside, "r+")

    def write(self, index: Array, sketches: Tensor) -> None:
        """Writes the sketches (B, 2) of samples (B,)."""
        assert self._next is not None, "begin() creates the file"
        self._next[index] = sketches.double().numpy()

    def publish(self) -> None:
        """Completes the file."""
        self._next = None
        publish(self.folder / "samples.next.tmp", self._file)

    def exists(self) -> bool:
        """Whether the file is complete."""
        return is_complete(self._file, self._room)

    def rows(self, index: Array) -> Tensor:
        """Sketches (B, 2) of samples (B,)."""
        if self._open is None:
            self._open = self._map(self._file, "r")
        return torch.from_numpy(self._open[index])

    def close(self) -> None:
        """Forgets the open file, which may be written anew."""
        self._open = None
