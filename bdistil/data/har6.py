"""HAR-6: six activities from a smartphone at the waist (UCI 240; D. Anguita et al., 2013), official test subjects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bdistil.data.base import FeatureModule, Samples
from bdistil.data.readers import Source, cached_features, check_subjects, read_numbers
from bdistil.data.readers.files import Array

STEPS, CLASSES = 128, 6  # 2.56 s at 50 Hz
SIGNALS = [f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"]
TRAIN_SUBJECTS = (1, 3, 5, 6, 7, 8, 11, 14, 15, 16, 17, 19, 21, 22, 23, 25, 26, 27, 28, 29, 30)
WINDOWS = {"train": 7352, "test": 2947}
SPEC = {"version": 1, "kind": "UCI HAR inertial signals", "steps": STEPS, "signals": SIGNALS}
SOURCE = Source(
    "Human Activity Recognition Using Smartphones",
    "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones",
    "mkdir -p {root} && cd {root} && curl -Lo har.zip 'https://archive.ics.uci.edu/static/public/240/"
    "human+activity+recognition+using+smartphones.zip' && unzip -q har.zip && unzip -q 'UCI HAR Dataset.zip'",
    "UCI HAR Dataset",
)
read_signal = partial(read_numbers, source=SOURCE, columns=STEPS)
read_column = partial(read_numbers, source=SOURCE, columns=1)


class Har6(FeatureModule):
    """HAR-6: sequences (128, 9) of accelerometer and gyroscope, 6 activities, parts by subject.

    Args:
        root: folder `UCI HAR Dataset`, or its parent.
        validation: subjects of the official training part that form the validation part; the default was drawn once.
        options: as for `FeatureModule`.

    Raises:
        UserError: a value outside of its range.
    """

    def __init__(self, root: str = "data", *, validation: Sequence[int] = (7, 22, 28), **options: Any) -> None:
        super().__init__(root, **options)
        others = [subject for subject in TRAIN_SUBJECTS if subject not in validation]
        check_subjects(TRAIN_SUBJECTS, validation=validation, others=others)
        self.validation = list(validation)

    def read(self) -> dict[str, Samples]:
        """Windows (n, 128, 9) and activities 0 … 5 of the parts."""
        names = ["y", "subject", *(f"Inertial Signals/{signal}" for signal in SIGNALS)]
        folder = SOURCE.locate(self.root, [f"{part}/{name}_{part}.txt" for part in WINDOWS for name in names])
        x, labels, subjects = self._official(folder, "train")
        held = np.isin(subjects, self.validation)
        tested, tested_labels, _ = self._official(folder, "test")
        return {
            "train": (x[~held], labels[~held].tolist()),
            "val": (x[held], labels[held].tolist()),
            "test": (tested, tested_labels.tolist()),
        }

    def _official(self, folder: Path, part: str) -> tuple[Array, Array, Array]:
        """Windows (n, 128, 9), labels (n,) and subjects (n,) of an official part."""
        signals = [folder / part / "Inertial Signals" / f"{name}_{part}.txt" for name in SIGNALS]
        windows = cached_features(self.cache, f"har6_{part}", SPEC, signals, read_signal)
        labels = read_column(folder / part / f"y_{part}.txt")[:, 0].astype(np.int64) - 1
        subjects = read_column(folder / part / f"subject_{part}.txt")[:, 0].astype(np.int64)
        SOURCE.check_count(f"windows in {part}", windows.shape[1], WINDOWS[part], folder, self.partial)
        if not windows.shape[1] == len(labels) == len(subjects) or not set(labels) <= set(range(CLASSES)):
            raise SOURCE.damaged(
                folder / part,
                f"expected a label in 1 … {CLASSES} and a subject for each of its {windows.shape[1]} windows, got "
                f"{len(labels)} labels and {len(subjects)} subjects",
            )
        return np.ascontiguousarray(windows.transpose(1, 2, 0)), labels, subjects
