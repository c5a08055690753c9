"""A few unlabelled digits: what is at hand where the teacher is an API and its data are elsewhere."""

from __future__ import annotations

import gzip
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.digits import Digits
from bdistil.data.embedded import packaged_file
from bdistil.errors import UserError

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
