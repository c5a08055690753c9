"""Google-13: twelve keywords and one class for all other words, from Speech Commands v0.01 (arXiv 1804.03209).

Labels, official split and features are those of EdgeML's examples, so that figures on Google-13 can be compared.
"""

from __future__ import annotations

import wave
from functools import cache
from pathlib import Path

import numpy as np

from bdistil.data.base import FeatureModule, Samples
from bdistil.data.readers import Source, cached_features
from bdistil.data.readers.files import Array
from bdistil.errors import UserError

RATE = 16_000  # samples per second
SAMPLES = 16_000  # per clip
WINDOW, HOP = 400, 160  # samples: 25 ms, 10 ms
FFT, FILTERS = 512, 32
EMPHASIS = 0.97
STEPS = 99  # 98 full windows, and one completed with zeros
SPEC = {"version": 1, "kind": "log-mel energies", "rate": RATE, "samples": SAMPLES, "padding": "left", "window": WINDOW,
        "hop": HOP, "fft": FFT, "filters": FILTERS, "emphasis": EMPHASIS, "steps": STEPS}  # fmt: skip

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


def read_wav(path: Path) -> Array:
    """Samples (n,) int16 of a clip: up to a second, mono, 16 kHz, 16 bits, PCM.

    Raises:
        UserError: another format; the file is named.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count, *_ = file.getparams()
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise UserError(f"Expected {path} to be a sound file of PCM samples ({error}).") from error
    if (channels, rate, width) != (1, RATE, 2):
        raise UserError(
            f"Expected {path} to be mono, {RATE} Hz, 16 bits, got {channels} channels, {rate} Hz, {8 * width} bits."
        )
    if not 1 <= count <= SAMPLES or len(data) != 2 * count:
        raise UserError(
            f"Expected {path} to hold 1 … {SAMPLES} samples of two bytes, got {count} in {len(data)} bytes."
        )
    return np.frombuffer(data, "<i2").astype(np.int16)


@cache
def mel_filters() -> Array:
    """Triangles of equal width in mel from 0 to 8000 Hz, (257, 32), with corners at the bins floor(513 f / 16000)."""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), FILTERS + 2)
    corners = np.floor((FFT + 1) * 700 * (10 ** (mels / 2595) - 1) / RATE)
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    bins = np.arange(FFT // 2 + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a side of no width holds no bin
        rising, falling = (bins - left) / (peak - left), (right - bins) / (right - peak)
    return np.where((left <= bins) & (bins < peak), rising, np.where((peak <= bins) & (bins < right), falling, 0.0))


def log_mel(clip: Array) -> Array:
    """Log-mel energies (99, 32) float32 of a clip (16000,) of 16-bit amplitudes, not scaled.

    Digital silence is log(1e-10) = -23.03 in every filter.
    """
    signal = clip.astype(np.float64)
    signal[1:] -= EMPHASIS * signal[:-1].copy()
    signal = np.concatenate((signal, np.zeros((STEPS - 1) * HOP + WINDOW - SAMPLES)))
    frames = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP] * np.hamming(WINDOW)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2 / FFT
    energies = power @ mel_filters()
    logs: Array = np.log(np.where(energies == 0, np.finfo(float).eps, energies) + 1e-10)
    return logs.astype(np.float32)


def clip_features(path: Path) -> Array:
    """Log-mel energies (99, 32) of a clip; a shorter one is padded with zeros on the left.

    Raises:
        UserError: not a clip of up to a second at 16 kHz; the file is named.
    """
    clip = read_wav(path)
    return log_mel(np.pad(clip, (SAMPLES - len(clip), 0)))


def read_split(folder: Path) -> dict[str, list[str]]:
    """Clips `word/file.wav` of the three parts, in order: the two official lists; all others are for training.

    Recordings of background noise are left out.

    Raises:
        UserError: clips of a list are missing.
    """
    words = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    there = {f"{word}/{file.name}" for word in words for file in (folder / word).glob("*.wav")}
    parts = {}
    for part, name in LISTS.items():
        clips = (folder / name).read_text(encoding="utf-8").split()
        if lacking := [clip for clip in clips if clip not in there]:
            raise SOURCE.incomplete(folder, lacking, folder.parent)
        parts[part] = sorted(clips)
    return {"train": sorted(there - {*parts["val"], *parts["test"]}), **parts}


class Google13(FeatureModule):
    """Google-13: log-mel energies (99, 32) of a second of speech, twelve keywords and one class for other words.

    Arguments as for `FeatureModule`; `root` is the folder `speech_commands_v0.01` or its parent.
    """

    def read(self) -> dict[str, Samples]:
        """Log-mel energies (n, 99, 32) and labels of the parts."""
        folder = SOURCE.locate(self.root, [*LISTS.values(), *KEYWORDS])
        split = read_split(folder)
        for part, clips in split.items():
            SOURCE.check_count(f"clips in {part}", len(clips), CLIPS[part], folder, self.partial)
        every = [folder / clip for clips in split.values() for clip in clips]
        features = cached_features(self.cache, "google13", SPEC, every, clip_features)
        blocks = np.split(features, np.cumsum([len(clips) for clips in split.values()])[:-1])
        labels = [[label_of(clip) for clip in clips] for clips in split.values()]
        return dict(zip(split, zip(blocks, labels, strict=True), strict=True))
