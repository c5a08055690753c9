"""Learned mixing weights on the disk: one file per version, one row per sample."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.data.loaders.indexing import Index
from bdistil.errors import RunError
from bdistil.utils import distributed


class MixingStore:
    """The numbers (N, C) float32 that mixing learns, by sample index, shared by all processes.

    Each update writes a new version and a checkpoint records the version it belongs to, so a resumed fit reads the
    numbers of its checkpoint.

    Args:
        folder: of the files.
        samples: N.
        columns: C.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: int, columns: int) -> None:
        self.folder, self.shape = Path(folder), (samples, columns)
        self.round, self.version = 0, 0

    def start(self, number: int, first: Tensor) -> None:
        """Writes version 0 of a round: the last version of the round before, or `first` (N, C) without one."""
        earlier = [found for found in self._versions() if found[0] < number]
        rows = torch.from_numpy(np.array(self._read(*earlier[-1]))) if earlier else first
        distributed.barrier()  # all processes have read before files are removed
        self._remove(found for found in self._versions() if found[0] >= number)  # left by an interrupted attempt
        self.round, self.version = number, -1
        blocks = distributed.my_blocks(self.shape[0], BLOCK)
        self.add_version((np.arange(low, high), rows[low:high]) for low, high in blocks)

    def resume(self, number: int, version: int) -> None:
        """Opens a version of a round, as recorded in a checkpoint.

        Raises:
            RunError: the file is missing or incomplete.
        """
        self.round, self.version = number, version
        self._rows = self._read(number, version)

    def rows(self, index: Tensor | Index) -> Tensor:
        """Numbers (B, C) of samples, on the CPU."""
        return torch.from_numpy(self._rows[index.cpu().numpy() if isinstance(index, Tensor) else index])

    def add_version(self, rows: Iterable[tuple[Index, Tensor]]) -> None:
        """Writes the next version and opens it.

        Args:
            rows: sample indices (B,) and their numbers (B, C); each process passes other samples.
        """
        beside = self.folder / "mixing.next.tmp"
        row_files.blank(beside, self.shape)
        table = np.memmap(beside, np.float32, "r+", shape=self.shape)
        for index, values in rows:
            table[index] = values.float().cpu().numpy()
        table.flush()
        self.version += 1
        row_files.name(beside, self._file(self.round, self.version))
        self._rows = self._read(self.round, self.version)

    def remove_before(self, saved: int) -> None:
        """Removes the versions of this round before `saved`, and all but the last version of every other round."""
        distributed.barrier()
        found = self._versions()
        last = dict(found)  # ascending, so the last version of each round stays
        self._remove((r, v) for r, v in found if v < (saved if r == self.round else last[r]))

    def _file(self, number: int, version: int) -> Path:
        return self.folder / f"mixing.{number:03d}.{version:04d}.f32"

    def _versions(self) -> list[tuple[int, int]]:
        """(round, version) of the files that exist, ascending."""
        names = (re.fullmatch(r"mixing\.(\d{3})\.(\d{4})\.f32", path.name) for path in self.folder.glob("mixing.*"))
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def _read(self, number: int, version: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        path = self._file(number, version)
        if not row_files.whole(path, self.shape):
            raise RunError(
                f"{path} is missing or incomplete: {self.shape[0]} samples with {self.shape[1]} learned weights were "
                "expected. Put the file back, or start this fit again without its checkpoint."
            )
        return np.asarray(np.memmap(path, np.float32, "r", shape=self.shape))

    def _remove(self, versions: Iterable[tuple[int, int]]) -> None:
        if distributed.rank() == 0:
            for number, version in versions:
                self._file(number, version).unlink(missing_ok=True)
