"""A data module whose three parts are tensors in memory."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Batches = DataLoader[tuple[Tensor, ...]]


class TensorParts(pl.LightningDataModule):
    """Loaders of the parts `train`, `val` and `test`, which `setup` puts into `parts`.

    Args:
        batch_size: samples a training step.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.parts: dict[str, TensorDataset] = {}

    def train_dataloader(self) -> Batches:
        """Batches (x, y) of the training part, shuffled."""
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Batches:
        """The validation part."""
        return DataLoader(self.parts["val"], batch_size=500)

    def test_dataloader(self) -> Batches:
        """The test part, which a run reads once, at its end."""
        return DataLoader(self.parts["test"], batch_size=500)
