"""Data modules of sequences: features of all samples in memory, standardised by the training part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.parts import PartsModule
from bdistil.data.series import moments
from bdistil.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
Samples = tuple[Array, list[int]]


class FeatureModule(PartsModule):
    """Sequences (N, steps, C) in three parts; each feature has mean 0 and sd 1 over the steps of the training part.

    Args:
        root: where the data set is.
        batch_size: samples a training step.
        cache: where the features are kept; `features` in `root` by default.
        partial: take what is there, where it is less than what was published.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(self, root: str, batch_size: int, cache: str | None, partial: bool) -> None:
        super().__init__(batch_size)
        self.root, self.partial = root, partial
        self.cache = Path(cache) if cache else Path(root) / "features"

    def read(self) -> dict[str, Samples]:
        """Features (n, steps, C) and labels of the parts `train`, `val` and `test`."""
        raise NotImplementedError

    def finished(self, x: Tensor) -> Tensor:
        """What becomes of standardised sequences (n, steps, C) in the end."""
        return x

    def setup(self, stage: str | None = None) -> None:
        """Reads, or computes and keeps, the features, once.

        Raises:
            UserError: files are missing or damaged.
        """
        if self.parts:
            return
        read = self.read()
        if empty := [name for name, (x, _) in read.items() if not len(x)]:
            raise UserError(f"Expected samples in every part of {type(self).__name__}, got none in {', '.join(empty)}.")
        tensors = {name: torch.from_numpy(np.array(x)) for name, (x, _) in read.items()}
        mean, spread = moments([tensors["train"].flatten(0, 1)])
        for name, (_, labels) in read.items():
            standard = (tensors[name] - mean) / spread
            self.parts[name] = TensorDataset(self.finished(standard), torch.tensor(labels))
