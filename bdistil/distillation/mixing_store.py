"""What mixing has learned of every sample, in files of rows as the ledger's: versions that a checkpoint can name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.ledger.rows import Rows
from bdistil.errors import RunError
from bdistil.utils import distributed


class MixingStore:
    """Numbers (N, C) float32 by sample index; each update writes a version of its own, shared by all processes.

    A checkpoint remembers a version, so a fit that goes on from it finds the numbers that it had then. Versions older
    than the last checkpoint's are removed.

    Args:
        folder: where the files are.
        samples: N.
        columns: C.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: int, columns: int) -> None:
        self.folder, self.shape = Path(folder), (samples, columns)
        self.round, self.version = 0, 0
        self._next: Rows | None = None

    def _file(self, number: int, version: int) -> Path:
        return self.folder / f"mixing.{number:03d}.{version:04d}.f32"

    @property
    def _beside(self) -> Path:
        return self.folder / "mixing.next.tmp"

    def _found(self) -> list[tuple[int, int]]:
        names = (re.fullmatch(r"mixing\.(\d{3})\.(\d{4})\.f32", path.name) for path in self.folder.glob("mixing.*"))
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def start(self, number: int, first: Tensor) -> None:
        """Version 0 of a round: the last version of the round before it, or `first` (N, C) where there is none."""
        earlier = [found for found in self._found() if found[0] < number]
        rows = self._read(*earlier[-1]) if earlier else first.numpy()
        distributed.barrier()  # all have read before one writes
        self._remove(found for found in self._found() if found[0] >= number)  # of an earlier try
        self.round, self.version = number, -1
        self.begin()
        for low, high in distributed.my_blocks(self.shape[0], BLOCK):
            self.write(np.arange(low, high), torch.from_numpy(np.array(rows[low:high])))
        self.keep()

    def resume(self, number: int, version: int) -> None:
        """Opens the version of a round that a checkpoint remembers.

        Raises:
            RunError: it is missing or torn.
        """
        self.round, self.version = number, version
        self._rows = self._read(number, version)

    def _read(self, number: int, version: int) -> Rows:
        path = self._file(number, version)
        if not row_files.whole(path, self.shape):
            raise RunError(
                f"{path} is missing or torn: {self.shape[0]} samples with {self.shape[1]} learned weights were "
                "expected. Put the file back, or start this fit again without its checkpoint."
            )
        return row_files.mapped(path, self.shape)

    def rows(self, index: Tensor | np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """Numbers (B, C) of samples, on the CPU."""
        wanted = index.cpu().numpy() if isinstance(index, Tensor) else index
        return torch.from_numpy(self._rows.take(wanted, 0))

    def begin(self) -> None:
        """Starts the next version."""
        self._next = row_files.blank(self._beside, self.shape)

    def write(self, index: np.ndarray[Any, np.dtype[np.int64]], rows: Tensor) -> None:
        """Writes numbers (B, C) of samples to the next version; each process to samples of its own."""
        assert self._next is not None
        values = rows.float().cpu().numpy()
        if isinstance(self._next, np.ndarray):
            self._next[index] = values
            return
        for place, row in enumerate(index.tolist()):
            self._next[row : row + 1] = values[place : place + 1]

    def keep(self) -> None:
        """Gives the next version its name, and opens it."""
        self._next = None
        self.version += 1
        row_files.name(self._beside, self._file(self.round, self.version))
        self._rows = self._read(self.round, self.version)

    def forget(self, saved: int) -> None:
        """Removes versions of this round before the one that a checkpoint names, and all but the last of each other."""
        distributed.barrier()
        found = self._found()
        ends = {max(pair for pair in found if pair[0] == number) for number in {pair[0] for pair in found}}
        self._remove(
            (number, version)
            for number, version in found
            if (version < saved if number == self.round else (number, version) not in ends)
        )

    def _remove(self, versions: Iterable[tuple[int, int]]) -> None:
        if distributed.rank() == 0:
            for number, version in versions:
                self._file(number, version).unlink(missing_ok=True)
