"""Log-mel energies of one second of speech, as Google-13 has them: 99 steps of 32 filters.

The numbers are those of python_speech_features 0.6 (`logfbank` with a Hamming window), which the published figures on
Google-13 were made with. No cosine transform follows, so these are no MFCC.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

RATE = 16_000  # samples a second
SAMPLES = 16_000  # of a clip
WINDOW, HOP = 400, 160  # samples: 25 ms, 10 ms
FFT, FILTERS = 512, 32
EMPHASIS = 0.97
STEPS = 99  # 98 whole windows, and one that zeros complete
SPEC = {"version": 1, "kind": "log-mel energies", "rate": RATE, "samples": SAMPLES, "padding": "left", "window": WINDOW,
        "hop": HOP, "fft": FFT, "filters": FILTERS, "emphasis": EMPHASIS, "steps": STEPS}  # fmt: skip


def left_padded(clip: Array) -> Array:
    """A clip (n,) of up to a second with zeros before it, (16000,)."""
    return np.concatenate((np.zeros(SAMPLES - len(clip), clip.dtype), clip))


@cache
def mel_filters() -> Array:
    """Triangles of equal width in mel from 0 to 8000 Hz, (257, 32): corners at the bins floor(513 f / 16000)."""
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
