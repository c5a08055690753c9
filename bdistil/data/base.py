"""Base classes of the data modules: three parts, each with its loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from bdistil.data.readers.files import Array, Source
from bdistil.data.readers.images import ArrayImages, normalised
from bdistil.data.readers.preparation import moments, validation_split
from bdistil.errors import UserError, listed
from bdistil.utils.paths import user_path

PARTS = ("train", "val", "test")

Batches = DataLoader[tuple[Tensor, ...]]
Samples = tuple[Array, list[int]]
Images = tuple[Any, Tensor]


class PartsModule(pl.LightningDataModule):
    """A data module of three datasets of (x, y), in `parts` as `train`, `val` and `test`.

    Args:
        batch_size: samples in a training step.
        num_workers: worker processes that read and augment.

    Raises:
        UserError: a value outside of its range.
    """

    def __init__(self, batch_size: int = 128, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"Expected `batch_size` >= 1 and `num_workers` >= 0, got {batch_size} and {num_workers}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.parts: dict[str, Any] = {}

    def make_parts(self) -> dict[str, Any]:
        """The three datasets by name; called once.

        Raises:
            UserError: files are missing or damaged.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Fills `parts` at the first call."""
        self.parts = self.parts or self.make_parts()

    def check_outputs(self, outputs: int) -> None:
        """Compares a teacher's L with the number of class names in the attribute `labels`, if there is one.

        Raises:
            UserError: the numbers differ.
        """
        names = getattr(self, "labels", None)
        if names and len(names) != outputs:
            raise UserError(
                f"Expected a teacher and students of {len(names)} outputs, one for each class of {type(self).__name__} "
                f"({listed(names)}), got {outputs}. Set their `outputs`."
            )

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
        pinned = torch.cuda.is_available()  # for asynchronous copies to the GPU
        return DataLoader(self.parts[part], self.batch_size, shuffle, num_workers=self.num_workers, pin_memory=pinned)


class TensorParts(PartsModule):
    """A `PartsModule` of tensors in memory, evaluated in batches of 500; workers are seldom faster here."""

    def _loader(self, part: str, *, shuffle: bool = False) -> Batches:
        size = self.batch_size if shuffle else 500
        return DataLoader(self.parts[part], size, shuffle=shuffle, num_workers=self.num_workers)


def tensor_parts(x: Tensor, y: Tensor, rows: Sequence[Tensor]) -> dict[str, TensorDataset]:
    """The three parts of samples x (N, ...) and y (N, ...), from the row numbers of each."""
    return {name: TensorDataset(x[r], y[r]) for name, r in zip(PARTS, rows, strict=True)}


class FeatureModule(PartsModule):
    """Sequences (N, steps, C) in three parts; each feature has mean 0 and sd 1 over the steps of the training part.

    Args:
        root: folder of the data set, or its parent.
        batch_size: samples in a training step.
        cache: folder for the computed features; `features` in `root` by default.
        partial: accept fewer samples than were published.

    Raises:
        UserError: a value outside of its range.
    """

    pad_to = 0  # length to which sequences are zero-padded at the start; 0: no padding

    def __init__(
        self, root: str = "data", *, batch_size: int = 128, cache: str | None = None, partial: bool = False
    ) -> None:
        super().__init__(batch_size)
        self.root, self.partial = root, partial
        self.cache = user_path(cache, "cache") if cache else user_path(root, "root") / "features"

    def read(self) -> dict[str, Samples]:
        """Features (n, steps, C) and labels of each part."""
        raise NotImplementedError

    def make_parts(self) -> dict[str, Any]:
        """Standardised sequences of each part; the features are computed, or read from the cache."""
        read = self.read()
        if empty := [name for name, (x, _) in read.items() if not len(x)]:
            raise UserError(f"Expected samples in every part of {type(self).__name__}, got none in {', '.join(empty)}.")
        tensors = {name: torch.from_numpy(np.array(x)) for name, (x, _) in read.items()}
        mean, spread = moments([tensors["train"].flatten(0, 1)])
        before = (0, 0, max(0, self.pad_to - tensors["train"].shape[1]), 0)
        if not any(before):  # zeros that pad a standardised sequence are no raw values
            self.normalisation = mean, spread
        return {
            name: TensorDataset(F.pad((tensors[name] - mean) / spread, before), torch.tensor(labels))
            for name, (_, labels) in read.items()
        }


class ImageModule(PartsModule):
    """Images of an archive; the validation part is taken from its training part.

    Args:
        root: folder of the archive, or its parent.
        validation: number of validation images, stratified by class.
        augment: random crop and flip of the training images; needs `boosting.state: recompute`.
        split_seed: seed of the split, independent of the seed of a run.
        partial: accept fewer images or classes than were published.
        options: as for `PartsModule`.

    Raises:
        UserError: a value outside of its range.
    """

    SOURCE: ClassVar[Source]
    CLASSES: ClassVar[int]
    MEAN: ClassVar[tuple[float, ...]]  # pixel mean of the training images, in 0 … 1, as in the literature
    STD: ClassVar[tuple[float, ...]]
    DATASET: ClassVar[type[ArrayImages]] = ArrayImages

    def __init__(
        self,
        root: str = "data",
        *,
        validation: int = 5000,
        augment: bool = False,
        split_seed: int = 0,
        partial: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.validation, self.augment = root, validation, augment
        self.split_seed, self.partial = split_seed, partial
        self.mean, self.std = [*self.MEAN], [*self.STD]
        self.normalisation = tuple(torch.tensor(values).view(-1, 1, 1) for values in (self.MEAN, self.STD))

    def read(self) -> tuple[Images, Images]:
        """Images and labels of the official training part, and of the test part."""
        raise NotImplementedError

    def transforms(self, augment: bool) -> list[v2.Transform]:
        """Transforms of a uint8 image."""
        raise NotImplementedError

    def make_parts(self) -> dict[str, Any]:
        """Datasets of images; only the training part is augmented."""
        (images, labels), tested = self.read()
        train, val = validation_split(labels, self.validation, self.split_seed)
        plain, random = (normalised(self.transforms(augment), self.MEAN, self.STD) for augment in (False, self.augment))
        parts = (images[train], labels[train], random), (images[val], labels[val], plain), (*tested, plain)
        return {name: self.DATASET(*part) for name, part in zip(PARTS, parts, strict=True)}
