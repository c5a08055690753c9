"""What our data modules share: three parts, each with its loader."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.errors import UserError

Batches = DataLoader[tuple[Tensor, ...]]


class PartsModule(pl.LightningDataModule):
    """A data module whose `setup` fills `parts` with `train`, `val` and `test`, each a dataset of (x, y).

    Args:
        batch_size: samples a training step.
        num_workers: processes that read and augment.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"Expected `batch_size` >= 1 and `num_workers` >= 0, got {batch_size} and {num_workers}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.parts: dict[str, Any] = {}

    def train_dataloader(self) -> Batches:
        """Batches (x, y) of the training part, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Batches:
        """The validation part, in order, never augmented."""
        return self._loader("val")

    def test_dataloader(self) -> Batches:
        """The test part, which a run reads once, at its end."""
        return self._loader("test")

    def _loader(self, part: str, *, shuffle: bool = False) -> Batches:
        pinned = torch.cuda.is_available()  # the copy to a GPU then need not be waited for
        workers = self.num_workers
        return DataLoader(self.parts[part], self.batch_size, shuffle=shuffle, num_workers=workers, pin_memory=pinned)


class TensorParts(PartsModule):
    """The same of tensors in memory: read without workers, evaluated in batches of 500.

    Args:
        batch_size: samples a training step.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)

    def _loader(self, part: str, *, shuffle: bool = False) -> Batches:
        return DataLoader(self.parts[part], self.batch_size if shuffle else 500, shuffle=shuffle)
