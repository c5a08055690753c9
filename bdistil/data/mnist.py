"""MNIST from its authors' idx files (Y. LeCun, C. Cortes, C. J. C. Burges, 1998), with labels and without."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import PARTS, TensorParts
from bdistil.data.digits import CLASSES, DEVIATION, MEAN, SIDE
from bdistil.data.readers import Source, validation_split
from bdistil.errors import UserError

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
PUBLISHED = {"train": 60_000, "test": 10_000}
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"
SOURCE = Source(
    "MNIST",
    "http://yann.lecun.com/exdb/mnist",
    "mkdir -p {root}/mnist && cd {root}/mnist && curl "
    + " ".join(f"-O {MIRROR}/{file}" for files in FILES.values() for file in files),
    "mnist",
)
BYTES = 8  # type code of bytes in an idx file


def read_idx(file: Path, dimensions: int) -> Tensor:
    """Array uint8 of an idx file, packed by gzip: two zeros, type, number of dimensions, each size, all big-endian.

    Raises:
        UserError: the file is damaged or not the expected one.
    """
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise SOURCE.damaged(file, f"it is not a complete gzip file ({error})") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, BYTES, dimensions)) or len(content) < start:
        raise SOURCE.damaged(file, f"it is no idx file of bytes with {dimensions} dimensions")
    sizes = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != math.prod(sizes):
        raise SOURCE.damaged(file, f"it has {len(content) - start:,} values, expected {sizes}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def read_mnist(root: str, part: str, partial: bool = False) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 with mean 0 and sd 1 over all pixels of the training set, labels (N,) int64.

    Args:
        root: folder `mnist`, or its parent.
        part: `train` or `test`.
        partial: accept fewer images than were published.

    Raises:
        UserError: files are missing or damaged.
    """
    place = SOURCE.locate(root, [name for names in FILES.values() for name in names])
    (images_file, labels_file) = (place / name for name in FILES[part])
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if tuple(images.shape[1:]) != (SIDE, SIDE):
        raise SOURCE.damaged(images_file, f"its images are {tuple(images.shape[1:])}, expected {(SIDE, SIDE)}")
    if len(labels) != len(images) or (len(labels) and int(labels.max()) >= CLASSES):
        raise SOURCE.damaged(labels_file, f"expected {len(images):,} labels in 0 … {CLASSES - 1}")
    SOURCE.check_count(f"images in {part}", len(images), PUBLISHED[part], place, partial)
    return (images.unsqueeze(1) / 255 - MEAN) / DEVIATION, labels.long()


class Mnist(TensorParts):
    """MNIST, 28x28 grey images of ten digits, in memory; the official test part is the test part.

    Args:
        root: folder `mnist` with the four files, or its parent.
        batch_size: samples in a training step.
        validation: number of validation images, taken from the training images and stratified by class.
        split_seed: seed of the split, independent of the seed of a run.
        partial: accept fewer images than were published.

    Raises:
        UserError: a value outside of its range. In `setup`: files are missing or damaged.
    """

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        validation: int = 5000,
        split_seed: int = 0,
        partial: bool = False,
    ) -> None:
        super().__init__(batch_size)
        self.root, self.validation, self.split_seed, self.partial = root, validation, split_seed, partial
        # `bdistil export` writes them to its manifest.
        self.normalisation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        self.labels = [str(digit) for digit in range(CLASSES)]

    def make_parts(self) -> dict[str, Any]:
        """Images and labels of the three parts."""
        images, labels = read_mnist(self.root, "train", self.partial)
        rows = validation_split(labels, self.validation, self.split_seed)
        parts = {name: TensorDataset(images[r], labels[r]) for name, r in zip(PARTS, rows, strict=False)}
        return {**parts, "test": TensorDataset(*read_mnist(self.root, "test", self.partial))}


class LocalMnist(Mnist):
    """Unlabelled local images of MNIST as training and validation part, and the labelled official test part.

    The local labels are -1, so that nothing can use them.

    Args:
        root: as for `Mnist`.
        share: size of the local set relative to the training images.
        held_out: share of the local images that is held out, for choosing the best epoch.
        batch_size: samples in a training step.
        options: as for `Mnist`, whose validation part is not used.

    Raises:
        UserError: as for `Mnist`.
    """

    def __init__(
        self, root: str = "data", *, share: float = 0.1, held_out: float = 0.1, batch_size: int = 64, **options: Any
    ) -> None:
        super().__init__(root, batch_size=batch_size, **options)
        if not 0 < share <= 1 or not 0 < held_out < 1:
            raise UserError(f"Expected `share` in (0, 1] and `held_out` in (0, 1), got {share} and {held_out}.")
        self.share, self.held_out = share, held_out

    def make_parts(self) -> dict[str, Any]:
        """Local images with the label -1, and the test part."""
        images, _ = read_mnist(self.root, "train", self.partial)
        count = round(self.share * len(images))
        held_out = max(2, round(self.held_out * count))
        if count - held_out < 2:
            raise UserError(f"Expected `share` to leave 4 local images or more, got {count}.")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
        val, train = images[order[:count]].split([held_out, count - held_out])
        parts = {"train": train, "val": val}
        unlabelled = {name: TensorDataset(x, torch.full((len(x),), -1)) for name, x in parts.items()}
        return {**unlabelled, "test": TensorDataset(*read_mnist(self.root, "test", self.partial))}
