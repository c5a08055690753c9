"""Data modules of sequences: features of all samples in memory, standardised by the training part."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.loaders import Batches, batches
from bdistil.data.series import moments
from bdistil.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
Samples = tuple[Array, list[int]]


class FeatureModule(pl.LightningDataModule):
    """Sequences (N, steps, C) in three parts; each feature has mean 0 and sd 1 over the steps of the training part.

    Args:
        batch_size: samples a training step.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"Expected `batch_size` >= 1, got {batch_size}.")
        self.batch_size = batch_size
        self.parts: dict[str, TensorDataset] = {}

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

    def train_dataloader(self) -> Batches:
        """Batches (x (B, steps, C), y (B,)), shuffled."""
        return batches(self.parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> Batches:
        """The validation part."""
        return batches(self.parts["val"], 512)

    def test_dataloader(self) -> Batches:
        """The test part, which a run reads once, at its end."""
        return batches(self.parts["test"], 512)
