"""Smartwatch recordings of shoulder exercises, from a file of the package `seglearn` (arXiv 1802.01489).

140 recordings, 20 of each of 7 exercises, by 10 subjects: 3 axes of acceleration and 3 of rotation at 50 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import PARTS, TensorParts
from bdistil.data.readers import check_subjects, load_arrays, moments, packaged_file, windows
from bdistil.errors import UserError

FILE = "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
RATE = 50  # Hz, of the recordings
SUBJECTS = range(1, 11)

Recordings = tuple[list[Tensor], Tensor, Tensor]


def read_watch() -> Recordings:
    """Recordings, each (steps, 6) float32 at 50 Hz, the exercise (N,) int64 of each and the subject (N,) int64."""
    with packaged_file("seglearn", FILE, SHA256).open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        data = load_arrays(file).item()
    series = [torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in data["X"]]
    labels, subjects = (torch.from_numpy(np.array(data[key], dtype=np.int64)) for key in ("y", "subject"))
    return series, labels, subjects


class Watch(TensorParts):
    """Windows (steps, 6) of 7 exercises, 2 s at 25 Hz by default.

    `split: time` cuts each recording into three consecutive pieces: training, validation, test. Windows are cut inside
    a piece, so no two parts share a sample, but they share the subjects. `split: subject` gives each part different
    subjects, which is much harder. Channels are standardised by the training part.

    Args:
        batch_size: windows in a training step.
        split: `time` within the recordings, or by `subject`.
        validation: share of each recording, before the test piece; `split: time` only.
        test: share of each recording, at its end; `split: time` only.
        validation_subjects: subjects of the validation part, from 1 … 10; `split: subject` only.
        test_subjects: subjects of the test part, likewise; the others are in the training part.
        seconds: length of a window.
        hop: seconds between the starts of two windows.
        train_hop: `hop` of the training part, if it differs.
        stride: keep every `stride`-th step of the 50 Hz.
    """

    def __init__(
        self,
        batch_size: int = 128,
        split: Literal["time", "subject"] = "time",
        validation: float = 0.15,
        test: float = 0.3,
        validation_subjects: Sequence[int] = (6, 7),
        test_subjects: Sequence[int] = (8, 9, 10),
        seconds: float = 2.0,
        hop: float = 1.0,
        train_hop: float | None = None,
        stride: int = 2,
    ) -> None:
        hops = {"train": hop if train_hop is None else train_hop, "val": hop, "test": hop}
        super().__init__(batch_size)
        if stride < 1 or min(seconds, *hops.values()) * RATE < stride:
            raise UserError(
                "Expected `stride` >= 1, and `seconds`, `hop` and `train_hop` of one step or more "
                f"({stride / RATE:g} s), got {stride}, {seconds:g}, {hop:g} and {hops['train']:g}."
            )
        if split not in ("time", "subject"):
            raise UserError(f"Expected `split` to be 'time' or 'subject', got {split!r}.")
        if min(validation, test) <= 0 or validation + test > 0.9:
            raise UserError(
                f"Expected `validation` and `test` > 0, together at most 0.9 of a recording, got {validation:g}, "
                f"{test:g}."
            )
        self.split, self.stride = split, stride
        self.shares = (1 - validation - test, validation, test)
        rest = set(SUBJECTS).difference(validation_subjects, test_subjects)
        check_subjects(
            SUBJECTS, validation_subjects=validation_subjects, test_subjects=test_subjects, others=sorted(rest)
        )
        self.subjects = {"train": rest, "val": set(validation_subjects), "test": set(test_subjects)}
        self.length = round(seconds * RATE / stride)
        self.hops = {name: max(1, round(value * RATE / stride)) for name, value in hops.items()}

    def make_parts(self) -> dict[str, Any]:
        """Standardised windows of the three parts."""
        recordings, labels, subjects = read_watch()
        series = [recording[:: self.stride] for recording in recordings]
        pieces = split_in_time(series, self.shares) if self.split == "time" else self._by_subject(series, subjects)
        self.normalisation = mean, spread = moments(pieces["train"])
        parts = {}
        for name, cut in pieces.items():
            found = [windows((x - mean) / spread, self.length, self.hops[name]) for x in cut]
            y = labels.repeat_interleave(torch.tensor([len(w) for w in found]))
            parts[name] = TensorDataset(torch.cat(found).contiguous(), y)
        return parts

    def _by_subject(self, series: Sequence[Tensor], subjects: Tensor) -> dict[str, list[Tensor]]:
        """Assigns each recording to the part of its subject, and an empty piece of it to the others."""
        return {
            name: [x if int(s) in chosen else x[:0] for x, s in zip(series, subjects, strict=True)]
            for name, chosen in self.subjects.items()
        }


def split_in_time(series: Sequence[Tensor], shares: Sequence[float]) -> Mapping[str, list[Tensor]]:
    """Consecutive pieces of every recording for the three parts, by their shares of it.

    Example:
        >>> {name: pieces[0].tolist() for name, pieces in split_in_time([torch.arange(10)], (0.5, 0.2, 0.3)).items()}
        {'train': [0, 1, 2, 3, 4], 'val': [5, 6], 'test': [7, 8, 9]}
    """
    ends = np.cumsum(shares)[:-1]
    pieces = [x.tensor_split(np.round(ends * len(x)).astype(int).tolist()) for x in series]
    return {name: list(cut) for name, cut in zip(PARTS, zip(*pieces, strict=True), strict=True)}
