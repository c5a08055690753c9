"""What our data modules share: three parts, each with its loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bdistil.data.readers.series import moments
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
