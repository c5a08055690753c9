"""Sound files of 16-bit samples, read so that a wrong one is refused by name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
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
