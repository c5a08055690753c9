"""Smartwatch recordings of shoulder exercises, from a file that the package `seglearn` ships (arXiv 1802.01489).

140 recordings, 20 of each of 7 exercises, by 10 subjects: 3 axes of acceleration and 3 of rotation at 50 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from bdistil.data.base import TensorParts
from bdistil.data.readers.pickles import load_arrays
from bdistil.data.readers.series import moments, windows
from bdistil.data.readers.sources import packaged_file
from bdistil.errors import UserError

FILE = "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
RATE = 50  # Hz, of the recordings
CHANNELS = 6
CLASSES = 7
SUBJECTS = range(1, 11)
PARTS = ("train", "val", "test")

Recordings = tuple[list[Tensor], Tensor, Tensor]


def read_watch(path: Path) -> Recordings:
    """Recordings of the file: its pickle is read by a reader that knows arrays and nothing else.

    Args:
        path: of a `.npy` of version 1 whose one item is a dictionary of X, y and subject.

    Returns:
        Recordings, each (steps, 6) float32 at 50 Hz, the exercise (N,) int64 of each and the subject (N,) int64.

    Raises:
        UserError: the file is damaged, or is another one; nothing that it names was called.
    """
    with open(path, "rb") as file:
        if file.read(8) != b"\x93NUMPY\x01\x00":
            raise UserError(f"Expected {path} to be a .npy file of version 1. Fetch it again.")
        file.seek(int.from_bytes(file.read(2), "little"), 1)
        try:
            content = load_arrays(file)
        except UserError as error:
            raise UserError(f"{path} was not read: {error}. Fetch it again.") from error
    return _recordings(content, path)


def _recordings(content: Any, path: Path) -> Recordings:
    inside = content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else None
    data: dict[str, Any] = inside if isinstance(inside, dict) else {}
    missing = {"X", "y", "subject"} - set(data)
    if missing:
        raise UserError(f"Expected {path} to hold X, y and subject, {', '.join(sorted(missing))} missing.")
    series = [torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in data["X"]]
    labels, subjects = (torch.from_numpy(np.array(data[key], dtype=np.int64)) for key in ("y", "subject"))
    bad = [tuple(x.shape) for x in series if x.ndim != 2 or x.shape[1] != CHANNELS]
    if bad or not len(series) == len(labels) == len(subjects):
        raise UserError(
            f"Expected recordings (steps, {CHANNELS}) with an exercise and a subject each in {path}, got "
            f"{len(series)}, {len(labels)} and {len(subjects)} of them" + (f", one of shape {bad[0]}." if bad else ".")
        )
    return series, labels, subjects


def time_spans(steps: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """First and last step (exclusive) of consecutive pieces of a recording, by their shares of it."""
    ends = np.round(np.cumsum([0.0, *shares]) * steps).astype(int).tolist()
    return list(pairwise(ends))


class Watch(TensorParts):
    """Windows (steps, 6) of 7 exercises, 2 s at 25 Hz unless told otherwise.

    `split: time` cuts each recording into three pieces, first to last: training, validation, test. Windows are cut
    inside a piece, so no two parts share a sample; but they share the subjects. `split: subject` gives the parts
    subjects of their own, which is harder by far. Channels are standardised by the training part.

    Args:
        batch_size: windows a training step.
        split: within the recordings, or by subject.
        validation: share of each recording, before the test piece; `split: time` only.
        test: share of each recording, at its end; `split: time` only.
        validation_subjects: of 1 … 10; `split: subject` only.
        test_subjects: of 1 … 10; `split: subject` only. The others train.
        seconds: length of a window.
        hop: seconds from the start of one window to that of the next.
        train_hop: the same of the training part; `hop` where it is not given.
        stride: every how many-th step of the 50 Hz is kept.
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
        if batch_size < 1 or stride < 1 or min(seconds, *hops.values()) * RATE < stride:
            raise UserError(
                "Expected `batch_size` and `stride` >= 1, and `seconds`, `hop` and `train_hop` of one step or more "
                f"({stride / RATE:g} s), got {batch_size}, {stride}, {seconds:g}, {hop:g} and {hops['train']:g}."
            )
        _check_split(split, validation, test, validation_subjects, test_subjects)
        super().__init__(batch_size)
        self.split, self.stride = split, stride
        self.shares = (1 - validation - test, validation, test)
        held_out = (set(validation_subjects), set(test_subjects))
        self.subjects = dict(zip(PARTS, (set(SUBJECTS).difference(*held_out), *held_out), strict=True))
        self.length = round(seconds * RATE / stride)
        self.hops = {name: max(1, round(value * RATE / stride)) for name, value in hops.items()}

    def setup(self, stage: str | None = None) -> None:
        """Reads the file, splits it and cuts windows, once."""
        if self.parts:
            return
        recordings, labels, subjects = read_watch(packaged_file("seglearn", FILE, SHA256))
        series = [recording[:: self.stride] for recording in recordings]
        pieces = split_in_time(series, self.shares) if self.split == "time" else self._by_subject(series, subjects)
        mean, spread = moments(pieces["train"])
        for name, cut in pieces.items():
            found = [windows((x - mean) / spread, self.length, self.hops[name]) for x in cut]
            y = labels.repeat_interleave(torch.tensor([len(w) for w in found]))
            self.parts[name] = TensorDataset(torch.cat(found).contiguous(), y)

    def _by_subject(self, series: Sequence[Tensor], subjects: Tensor) -> dict[str, list[Tensor]]:
        """Each recording in the part of its subject, an empty piece of it in the others."""
        return {
            name: [x if int(s) in chosen else x[:0] for x, s in zip(series, subjects, strict=True)]
            for name, chosen in self.subjects.items()
        }


def split_in_time(series: Sequence[Tensor], shares: Sequence[float]) -> Mapping[str, list[Tensor]]:
    """Pieces of every recording for the three parts, first to last; a step is in one of them only."""
    spans = [time_spans(len(x), shares) for x in series]
    return {
        name: [x[low:high] for x, (low, high) in zip(series, (span[i] for span in spans), strict=True)]
        for i, name in enumerate(PARTS)
    }


def _check_split(split: str, validation: float, test: float, val_people: Sequence[int], people: Sequence[int]) -> None:
    if split not in ("time", "subject"):
        raise UserError(f"Expected `split` to be 'time' or 'subject', got {split!r}.")
    if min(validation, test) <= 0 or validation + test > 0.9:
        raise UserError(
            f"Expected `validation` and `test` > 0, together at most 0.9 of a recording, got {validation:g}, {test:g}."
        )
    known, chosen = set(SUBJECTS), [*val_people, *people]
    if not val_people or not people or len(set(chosen)) != len(chosen) or not set(chosen) < known:
        raise UserError(
            "Expected `validation_subjects` and `test_subjects` to be different ones of 1 … 10, one or more each, and "
            f"not all of them, got {list(val_people)} and {list(people)}."
        )
