"""JapaneseVowels: 640 utterances of /ae/ by nine speakers, from files of the package `sktime`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdistil.data.base import TensorParts, tensor_parts
from bdistil.data.readers import moments, packaged_file, validation_split
from bdistil.errors import UserError

FOLDER = "sktime/datasets/data/JapaneseVowels"
SHA256 = {
    "TRAIN": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "TEST": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
CLASSES = 9
STEPS = 29  # the longest utterance; each step has 12 linear prediction cepstra
TRAINING = 270  # utterances of the official training part, 30 of each speaker


def read_vowels(part: str) -> tuple[list[Tensor], Tensor]:
    """Utterances (7 … 29 steps, 12) and speakers (N,) of the official part `TRAIN` or `TEST`.

    Each line after `@data` is an utterance: channels separated by colons, values by commas, the speaker last.
    """
    path = packaged_file("sktime", f"{FOLDER}/JapaneseVowels_{part}.ts", SHA256[part])
    cases = [line.split(":") for line in path.read_text(encoding="utf-8").partition("@data")[2].split()]
    series = [np.array([channel.split(",") for channel in channels], np.float32).T for *channels, _ in cases]
    return [torch.from_numpy(s.copy()) for s in series], torch.tensor([int(speaker) - 1 for *_, speaker in cases])


class Vowels(TensorParts):
    """Utterances (29, 12) of nine speakers in the official parts; the validation part is taken from the training part.

    Each channel is standardised by the frames of the training part; then utterances are padded with zeros on the left.

    Args:
        batch_size: utterances in a training step.
        validation: utterances of the validation part, a multiple of 9.
        split_seed: seed of the split, independent of the seed of a run.
    """

    def __init__(self, batch_size: int = 32, validation: int = 54, split_seed: int = 0) -> None:
        super().__init__(batch_size)
        if not CLASSES <= validation <= TRAINING // 2 or validation % CLASSES:
            raise UserError(f"Expected `validation` to be a multiple of 9 in 9 … {TRAINING // 2}, got {validation}.")
        self.validation, self.split_seed = validation, split_seed

    def make_parts(self) -> dict[str, Any]:
        """Standardised and padded utterances of the three parts."""
        series, labels = read_vowels("TRAIN")
        test, test_labels = read_vowels("TEST")
        train, val = validation_split(labels, self.validation, self.split_seed)
        mean, spread = moments([series[i] for i in train])
        x = torch.stack([F.pad((s - mean) / spread, (0, 0, STEPS - len(s), 0)) for s in (*series, *test)])
        return tensor_parts(x, torch.cat((labels, test_labels)), (train, val, torch.arange(TRAINING, len(x))))
