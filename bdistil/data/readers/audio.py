"""Sound files of 16-bit samples, read so that a wrong one is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bdistil.errors import UserError

PCM, EXTENSIBLE = 1, 0xFFFE
# The rest of a sub-format of WAVE_FORMAT_EXTENSIBLE that stands for an old format number.
PLAIN_GUID = bytes.fromhex("000000001000800000aa00389b71")


def read_wav(path: Path, rate: int, longest: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Samples (n,) int16 of a RIFF file: mono, 16 bits, PCM, also in the form of WAVE_FORMAT_EXTENSIBLE.

    Args:
        path: of the file.
        rate: samples a second that it must have.
        longest: samples at most.

    Raises:
        UserError: something else; names the file.
    """
    chunks = dict(_chunks(path))
    form = chunks.get(b"fmt ", b"")
    if len(form) < 16 or b"data" not in chunks:
        raise UserError(f"{path} is no sound file: it lacks a whole `fmt ` or `data` chunk.")
    kind, channels, hertz, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == EXTENSIBLE and form[26:40] == PLAIN_GUID:
        kind = struct.unpack("<H", form[24:26])[0]
    if (kind, channels, hertz, bits) != (PCM, 1, rate, 16):
        raise UserError(
            f"Expected {path} to be mono, {rate} Hz, 16 bits, PCM (format 1), got {channels} channels, {hertz} Hz, "
            f"{bits} bits, format {kind}."
        )
    data = chunks[b"data"]
    if not data or len(data) % 2 or len(data) // 2 > longest:
        raise UserError(f"Expected {path} to hold 1 … {longest} samples of two bytes, got {len(data)} bytes.")
    return np.frombuffer(data, "<i2").astype(np.int16)


def _chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk."""
    content = path.read_bytes()
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise UserError(f"{path} is no sound file: it does not begin with RIFF and WAVE.")
    at = 12
    while at + 8 <= len(content):
        name, size = struct.unpack("<4sI", content[at : at + 8])
        if at + 8 + size > len(content):
            raise UserError(f"{path} is cut off: its chunk {name!r} has {len(content) - at - 8} of {size} bytes.")
        yield name, content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2  # chunks begin at even places


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
