"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.rows import Rows, blank, mapped, name, whole
from bdistil.utils import distributed


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
