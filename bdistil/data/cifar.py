"""CIFAR-10 and CIFAR-100 from their authors' Python files (A. Krizhevsky, 2009)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from bdistil.data.base import ImageModule, Images
from bdistil.data.readers import Source, load_arrays, pad_crop_flip
from bdistil.errors import UserError

SIDE = 32
TRAIN, TEST = 50_000, 10_000
URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
COMMANDS = "mkdir -p {{root}} && curl -L https://www.cs.toronto.edu/~kriz/{file} | tar xz -C {{root}}"


def read_batch(file: Path, source: Source, key: str, classes: int, part: str | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels (N,) of one file: rows of 1024 red, 1024 green and 1024 blue values.

    The file is a pickle of Python 2 with the labels under `key`, of the part `train` or `test`, if given; nothing
    in it is executed.

    Raises:
        UserError: the file is damaged or not the expected one.
    """
    try:
        with file.open("rb") as opened:
            batch = load_arrays(opened)
    except UserError as error:
        raise source.damaged(file, str(error)) from error
    if not isinstance(batch, dict) or "data" not in batch or key not in batch:
        raise source.damaged(file, f"it holds no `data` and `{key}`")
    data, labels, own = batch["data"], batch[key], batch.get("batch_label")
    if isinstance(own, str) and own.startswith({"train": "testing", "test": "training"}.get(part or "", "?")):
        raise source.damaged(file, f"it calls itself {own!r}, so it was renamed")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * SIDE**2):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise source.damaged(
            file, f"`data` is {got}, expected uint8 ({len(labels)}, {3 * SIDE**2}), one row for each label"
        )
    if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise source.damaged(file, f"`{key}` are not all integers in 0 … {classes - 1}")
    return torch.from_numpy(data.copy()).view(-1, 3, SIDE, SIDE), torch.tensor(labels)


class Cifar10(ImageModule):
    """CIFAR-10, 32x32 colour images of 10 classes, from `cifar-10-batches-py`.

    Args:
        padding: largest shift of training images in pixels when `augment` pads and crops; it also flips them. Tiny
            students, which have little capacity to spare, learn more from 2 than from the usual 4.
        options: as for `ImageModule`.
    """

    SOURCE = Source("CIFAR-10", URL, COMMANDS.format(file="cifar-10-python.tar.gz"), "cifar-10-batches-py")
    FILES: ClassVar[dict[str, list[str]]] = {
        "train": [f"data_batch_{number}" for number in range(1, 6)],
        "test": ["test_batch"],
    }
    LABELS: ClassVar[str] = "labels"
    CLASSES = 10
    MEAN = (0.4914, 0.4822, 0.4465)
    STD = (0.2470, 0.2435, 0.2616)

    def __init__(self, root: str = "data", *, padding: int = 4, **options: Any) -> None:
        super().__init__(root, **options)
        if not 0 <= padding < SIDE:
            raise UserError(f"Expected `padding` in 0 … {SIDE - 1}, got {padding}.")
        self.padding = padding

    def transforms(self, augment: bool) -> list[v2.Transform]:
        """The CIFAR augmentation, or no transforms."""
        return pad_crop_flip(SIDE, self.padding) if augment else []

    def read(self) -> tuple[Images, Images]:
        """Images uint8 (N, 3, 32, 32) and labels (N,) of the two official parts."""
        folder = self.SOURCE.locate(self.root, [name for names in self.FILES.values() for name in names])
        return self._read(folder, "train", TRAIN), self._read(folder, "test", TEST)

    def _read(self, folder: Path, part: str, published: int) -> tuple[Tensor, Tensor]:
        files = [folder / name for name in self.FILES[part]]
        images, labels = zip(*(read_batch(f, self.SOURCE, self.LABELS, self.CLASSES, part) for f in files), strict=True)
        self.SOURCE.check_count(f"images in {part}", sum(map(len, labels)), published, folder, self.partial)
        return torch.cat(images), torch.cat(labels)


class Cifar100(Cifar10):
    """CIFAR-100 with its 100 fine classes. Arguments as for `Cifar10`."""

    SOURCE = Source("CIFAR-100", URL, COMMANDS.format(file="cifar-100-python.tar.gz"), "cifar-100-python")
    FILES: ClassVar[dict[str, list[str]]] = {"train": ["train"], "test": ["test"]}
    LABELS = "fine_labels"
    CLASSES = 100
    MEAN = (0.5071, 0.4865, 0.4409)
    STD = (0.2673, 0.2564, 0.2762)
