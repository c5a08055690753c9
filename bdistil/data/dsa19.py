"""DSA-19: daily and sports activities of eight subjects (UCI 256; K. Altun, B. Barshan, O. Tunçel, 2010).

The parts are of different subjects. Which subjects the published figures on DSA-19 have in which part is not known, so
figures are to be reported with the lists of this module, or over several of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bdistil.data.base import Array, FeatureModule, Samples
from bdistil.data.readers.feature_cache import cached_features
from bdistil.data.readers.sources import Source, listed
from bdistil.data.readers.splits import check_subjects
from bdistil.errors import UserError

ACTIVITIES, SUBJECTS, SEGMENTS = 19, 8, 60
STEPS, CHANNELS = 125, 45  # 5 s at 25 Hz; five units of three accelerometers, gyroscopes and magnetometers
SPEC = {"version": 1, "kind": "UCI DSA segments", "steps": STEPS, "channels": CHANNELS}
SOURCE = Source(
    "Daily and Sports Activities",
    "https://archive.ics.uci.edu/dataset/256/daily+and+sports+activities",
    "mkdir -p {root}/dsa && cd {root}/dsa && curl -Lo dsa.zip "
    "'https://archive.ics.uci.edu/static/public/256/daily+and+sports+activities.zip' && unzip -q dsa.zip",
    "dsa/data",
)


def read_segment(path: Path) -> Array:
    """A segment (125, 45): 125 lines of 45 numbers with commas between.

    Raises:
        UserError: it is something else; names the file.
    """
    try:
        rows = [[float(cell) for cell in line.split(",")] for line in path.read_text().splitlines() if line.strip()]
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"Expected {path} to hold numbers with commas between ({error}). {_again()}") from error
    widths = sorted({len(row) for row in rows})
    if len(rows) != STEPS or widths != [CHANNELS]:
        raise UserError(
            f"Expected {path} to hold {STEPS} lines of {CHANNELS} numbers, got {len(rows)} lines of "
            f"{' or '.join(map(str, widths)) or 'no'} numbers. {_again()}"
        )
    segment = np.array(rows, np.float32)
    if not np.isfinite(segment).all():
        raise UserError(f"Expected {path} to hold finite numbers, got NaN or infinity. {_again()}")
    return segment


def _again() -> str:
    return f"Get {SOURCE.name} again from {SOURCE.url}."


class Dsa19(FeatureModule):
    """DSA-19: sequences (125, 45) of body-worn sensors, 19 activities, parts by subject.

    Args:
        root: holds `dsa/data`, or is the folder of a01 … a19.
        batch_size: samples a training step.
        train: subjects of the training part, in 1 … 8.
        validation: subjects of the validation part.
        test: subjects of the test part.
        pad_to: steps; zeros stand before the 125. Some papers count 129 and do not say how; call such a run so.
        cache: where the features are kept; `features` in `root` by default.
        partial: take what is there, where it is less than was published.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        train: Sequence[int] = (1, 2, 3, 4),
        validation: Sequence[int] = (5, 6),
        test: Sequence[int] = (7, 8),
        pad_to: int = STEPS,
        cache: str | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__(root, batch_size, cache, partial)
        self.subjects = {"train": list(train), "val": list(validation), "test": list(test)}
        check_subjects(self.subjects, range(1, SUBJECTS + 1))
        if pad_to < STEPS:
            raise UserError(f"Expected `pad_to` >= {STEPS}, the steps of a segment, got {pad_to}.")
        self.pad_to = pad_to

    def read(self) -> dict[str, Samples]:
        """Segments (n, 125, 45) and activities 0 … 18 of the parts."""
        activities, subjects, segments = (range(1, n + 1) for n in (ACTIVITIES, SUBJECTS, SEGMENTS))
        folder = SOURCE.locate(self.root, [f"a{number:02}" for number in activities][: 1 if self.partial else None])
        every = list(product(activities, subjects, segments))
        names = {key: "a{:02}/p{}/s{:02}.txt".format(*key) for key in every}
        there = [key for key in every if (folder / names[key]).is_file()]
        if len(there) < len(every) and not self.partial:
            lacking = [names[key] for key in sorted({*every} - {*there})]
            raise UserError(
                f"{SOURCE.name} is not complete: {folder.absolute()} lacks {len(lacking):,} of {len(every):,} files: "
                f"{listed(lacking)}. Give partial=true to use what is there. {SOURCE.cure(self.root)}"
            )
        x = cached_features(self.cache, "dsa19", SPEC, [folder / names[key] for key in there], read_segment)
        rows = {part: [i for i, (_, p, _) in enumerate(there) if p in chosen] for part, chosen in self.subjects.items()}
        return {part: (x[chosen], [there[i][0] - 1 for i in chosen]) for part, chosen in rows.items()}

    def finished(self, x: Tensor) -> Tensor:
        """Segments (n, 125, 45) with zeros before them, (n, pad_to, 45)."""
        return F.pad(x, (0, 0, self.pad_to - STEPS, 0))
