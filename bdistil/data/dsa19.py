"""DSA-19: daily and sports activities of eight subjects (UCI 256; K. Altun, B. Barshan, O. Tunçel, 2010).

The parts have different subjects. The split behind the published figures on DSA-19 is not known, so report figures
together with the subjects of each part, or over several splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

from bdistil.data.base import FeatureModule, Samples
from bdistil.data.readers import Source, cached_features, check_subjects, read_numbers
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
read_segment = partial(read_numbers, source=SOURCE, columns=CHANNELS, lines=STEPS, delimiter=",")


class Dsa19(FeatureModule):
    """DSA-19: sequences (125, 45) of body-worn sensors, 19 activities, parts by subject.

    Args:
        root: parent of `dsa/data`, or the folder with a01 … a19.
        train: subjects of the training part, from 1 … 8.
        validation: subjects of the validation part.
        test: subjects of the test part.
        pad_to: length after zero-padding before the 125 steps. Some papers use 129 steps without saying how.
        options: as for `FeatureModule`.

    Raises:
        UserError: a value outside of its range.
    """

    def __init__(
        self,
        root: str = "data",
        *,
        train: Sequence[int] = (1, 2, 3, 4),
        validation: Sequence[int] = (5, 6),
        test: Sequence[int] = (7, 8),
        pad_to: int = STEPS,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        check_subjects(range(1, SUBJECTS + 1), train=train, validation=validation, test=test)
        self.subjects = {"train": train, "val": validation, "test": test}
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
        SOURCE.check_count("segments", len(there), len(every), folder, self.partial)
        x = cached_features(self.cache, "dsa19", SPEC, [folder / names[key] for key in there], read_segment)
        rows = {part: [i for i, (_, p, _) in enumerate(there) if p in chosen] for part, chosen in self.subjects.items()}
        return {part: (x[chosen], [there[i][0] - 1 for i in chosen]) for part, chosen in rows.items()}
