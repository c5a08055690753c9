"""Google-13: twelve keywords and everything else, from Speech Commands v0.01 (P. Warden, arXiv 1804.03209).

Labels, official split and features are those of EdgeML's examples, so that figures on Google-13 can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdistil.data.base import Array, FeatureModule, Samples
from bdistil.data.readers.audio import RATE, SAMPLES, SPEC, left_padded, log_mel, read_wav
from bdistil.data.readers.feature_cache import cached_features
from bdistil.data.readers.sources import Source, listed
from bdistil.errors import UserError

KEYWORDS = ("go", "no", "on", "up", "bed", "cat", "dog", "off", "one", "six", "two", "yes")  # 1 … 12; the rest is 0
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
CLIPS = {"train": 51_088, "val": 6_798, "test": 6_835}
SOURCE = Source(
    "Speech Commands v0.01",
    "http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
    "mkdir -p {root}/speech_commands_v0.01 && curl -L http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz "
    "| tar xz -C {root}/speech_commands_v0.01",
    "speech_commands_v0.01",
)


def label_of(clip: str) -> int:
    """The class of a clip `word/file.wav`."""
    word = clip.partition("/")[0]
    return KEYWORDS.index(word) + 1 if word in KEYWORDS else 0


def clip_features(path: Path) -> Array:
    """Log-mel energies (99, 32) of a clip; a shorter one has zeros before it.

    Raises:
        UserError: it is no clip of up to a second at 16 kHz; names the file.
    """
    return log_mel(left_padded(read_wav(path, RATE, SAMPLES)))


def read_split(folder: Path) -> dict[str, list[str]]:
    """Clips `word/file.wav` of the three parts, in order: the two official lists, and the rest for training.

    Recordings of noise are left out.

    Raises:
        UserError: clips of a list are missing.
    """
    words = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    there = {f"{word}/{file.name}" for word in words for file in (folder / word).glob("*.wav")}
    parts = {}
    for part, name in LISTS.items():
        clips = (folder / name).read_text(encoding="utf-8").split()
        if lacking := [clip for clip in clips if clip not in there]:
            raise UserError(
                f"{SOURCE.name} is not complete: {name} names {len(lacking):,} clips that {folder.absolute()} lacks: "
                f"{listed(lacking)}. {SOURCE.cure(folder.parent)}"
            )
        parts[part] = sorted(clips)
    return {"train": sorted(there - {*parts["val"], *parts["test"]}), **parts}


class Google13(FeatureModule):
    """Google-13: log-mel energies (99, 32) of a second of speech, twelve keywords and one class for other words.

    Args:
        root: holds `speech_commands_v0.01`, or is that folder.
        batch_size: samples a training step.
        cache: where the features are kept; `features` in `root` by default.
        partial: take what is there, where it is less than what was published.

    Raises:
        UserError: a value that cannot be.
    """

    def __init__(
        self, root: str = "data", batch_size: int = 128, cache: str | None = None, partial: bool = False
    ) -> None:
        super().__init__(root, batch_size, cache, partial)

    def read(self) -> dict[str, Samples]:
        """Log-mel energies (n, 99, 32) and labels of the parts."""
        folder = SOURCE.locate(self.root, [*LISTS.values(), *KEYWORDS])
        split = read_split(folder)
        for part, clips in split.items():
            SOURCE.check_count(f"clips in {part}", len(clips), CLIPS[part], folder, self.partial)
        every = [clip for clips in split.values() for clip in clips]
        features = cached_features(self.cache, "google13", SPEC, [folder / clip for clip in every], clip_features)
        return dict(zip(split, _cut(features, list(split.values())), strict=True))


def _cut(features: Array, parts: Sequence[Sequence[str]]) -> list[Samples]:
    """Features and labels of parts that follow each other."""
    ends = np.cumsum([len(clips) for clips in parts])
    blocks = np.split(features, ends[:-1])
    return [(block, [label_of(clip) for clip in clips]) for block, clips in zip(blocks, parts, strict=True)]
