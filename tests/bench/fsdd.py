"""Log-mel pictures of the Free Spoken Digit Dataset (Z. Jackson and others) as a .npz file: fsdd.py RECORDINGS OUT.

3,000 recordings of ten digits by six speakers at 8 kHz. The official test part are numbers 0 to 4 of each digit and
speaker; of the others, 5 to 9 are for validation. A recording is cut or padded with silence to 0.8 seconds.
"""

import sys
import wave
from pathlib import Path

import numpy as np

RATE, WINDOW, HOP, FFT, FILTERS, STEPS = 8000, 200, 100, 256, 32, 64


def mel_filters():
    """Triangles of equal width in mel from 0 to 4000 Hz, (129, 32)."""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), FILTERS + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    return np.clip(np.minimum((hertz - left) / (peak - left), (right - hertz) / (right - peak)), 0, None)


def log_mel(path):
    """Log-mel energies (1, 32, 64) of a recording, cut or padded to 64 frames."""
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, RATE, 2), path
        signal = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float) / 2**15
    signal = signal[: (STEPS - 1) * HOP + WINDOW]
    signal = np.pad(signal, (0, (STEPS - 1) * HOP + WINDOW - len(signal)))
    frames = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP] * np.hanning(WINDOW)
    energies = np.abs(np.fft.rfft(frames, FFT)) ** 2 @ mel_filters()
    return np.log(energies + 1e-6).T[None].astype(np.float32)


def main(recordings, out):
    """Writes x and y of the three parts."""
    parts = {}
    for path in sorted(Path(recordings).glob("*.wav")):
        digit, _, number = path.stem.split("_")
        part = "test" if int(number) < 5 else "val" if int(number) < 10 else "train"
        parts.setdefault(part, []).append((log_mel(path), int(digit)))
    arrays = {f"{name}_{part}": np.array(values) for part, items in parts.items()
              for name, values in zip("xy", zip(*items, strict=True), strict=True)}  # fmt: skip
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
