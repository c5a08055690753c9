"""JapaneseVowels: 640 utterances of /ae/ by nine speakers, from files of the package `sktime`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import TensorParts
from bdistil.data.readers import moments, packaged_file, validation_split
from bdistil.errors import UserError

FOLDER = "sktime/datasets/data/JapaneseVowels"
SHA256 = {
    "TRAIN": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "TEST": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
CLASSES = 9
STEPS = 29  # the longest utterance
CHANNELS = 12  # linear prediction cepstra of a frame
TRAINING = 270  # utterances of the official training part, 30 of each speaker


def read_ts(path: Path) -> tuple[list[Tensor], Tensor]:
    """Series and classes of a `.ts` file with class labels.

    After the line `@data` each line is a case: channels separated by colons, values by commas, the class last.

    Args:
        path: the file.

    Returns:
        The series, each (steps, C) float32, and the class of each by its place in the header, (N,) int64.

    Raises:
        UserError: the file is cut off, a line has another form, or a class that is not in the header.
    """
    header, _, body = path.read_text(encoding="utf-8").partition("@data")
    tags = dict(line[1:].split(None, 1) for line in header.splitlines() if line.startswith("@") and " " in line)
    labelled, *names = tags.get("classLabel", "false").split()
    if not body.strip() or labelled != "true" or not names:
        raise UserError(f"Expected @classLabel with the classes, then @data and cases, in {path}. Fetch it again.")
    channels = int(tags["dimensions"]) if tags.get("dimensions", "").isdigit() else None
    series, classes = [], []
    for number, line in enumerate(body.strip().splitlines(), 1):
        *fields, name = line.split(":")
        if name not in names:
            raise _bad_case(path, number, f"one of the classes {', '.join(names)} at the end", repr(name[:40]))
        if channels is not None and len(fields) != channels:
            raise _bad_case(path, number, f"{channels} channels", str(len(fields)))
        try:
            values = np.array([field.split(",") for field in fields], dtype=np.float32)
        except ValueError as error:
            raise _bad_case(path, number, "channels of the same number of values", f"({error})") from None
        series.append(torch.from_numpy(values.T.copy()))
        classes.append(names.index(name))
    return series, torch.tensor(classes)


def _bad_case(path: Path, number: int, allowed: str, got: str) -> UserError:
    return UserError(f"Expected {allowed} in case {number} of {path}, got {got}. The file is damaged: fetch it again.")


def read_vowels(part: str) -> tuple[list[Tensor], Tensor]:
    """Utterances (7 … 29 steps, 12) and speakers (N,) of the official part `TRAIN` or `TEST`."""
    return read_ts(packaged_file("sktime", f"{FOLDER}/JapaneseVowels_{part}.ts", SHA256[part]))


class Vowels(TensorParts):
    """Utterances (29, 12) of nine speakers in the official parts; the validation part is taken from the training part.

    Each channel is standardised by the frames of the training part; then utterances are padded with zeros on the left.

    Args:
        batch_size: utterances in a training step.
        validation: utterances of the validation part, a multiple of 9.
        split_seed: seed of the split, independent of the seed of a run.
    """

    def __init__(self, batch_size: int = 32, validation: int = 54, split_seed: int = 0) -> None:
        if batch_size < 1 or not CLASSES <= validation <= TRAINING // 2 or validation % CLASSES:
            raise UserError(
                f"Expected `batch_size` >= 1 and `validation` a multiple of 9 in 9 … {TRAINING // 2}, "
                f"got {batch_size} and {validation}."
            )
        super().__init__(batch_size)
        self.validation, self.split_seed = validation, split_seed

    def make_parts(self) -> dict[str, Any]:
        """Standardised and padded utterances of the three parts."""
        series, labels = read_vowels("TRAIN")
        test, test_labels = read_vowels("TEST")
        train, val = validation_split(labels, self.validation, self.split_seed)
        mean, spread = moments([series[i] for i in train])

        def padded(chosen: list[Tensor]) -> Tensor:
            return torch.stack([F.pad((s - mean) / spread, (0, 0, STEPS - len(s), 0)) for s in chosen])

        return {
            "train": TensorDataset(padded([series[i] for i in train]), labels[train]),
            "val": TensorDataset(padded([series[i] for i in val]), labels[val]),
            "test": TensorDataset(padded(test), test_labels),
        }
