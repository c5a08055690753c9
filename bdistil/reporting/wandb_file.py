"""Reads the file in which W&B's own process keeps what was logged, as wandb has no public way to.

A ``.wandb`` file is a log as LevelDB writes it, behind a head of seven bytes: blocks of 32 KiB, in them chunks with a
head of checksum, length and kind. A record, a protobuf message of W&B, is one chunk or several.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD, BLOCK = 7, 32 * 1024  # bytes; the head of the file is as long as that of a chunk
END = 32  # blocks at the end of a file in which its last row is looked for before all of it is read


def records(data: bytes) -> Iterator[Any]:
    """The records in a file, or in what follows any border between its blocks, up to where a kill has torn it."""
    from wandb.proto import wandb_internal_pb2 as messages

    record_of = messages.Record.FromString  # type: ignore[attr-defined]  # has no types
    at, record = HEAD if data.startswith(b":W&B") else 0, None
    while at + HEAD <= len(data):
        if (left := BLOCK - at % BLOCK) < HEAD:
            at += left  # padding: no head fits into the rest of the block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + HEAD : at + HEAD + length]
        if kind == 0 or len(chunk) < length:
            return
        if kind in (1, 2):  # 1 is whole, 2 to 4 are first, middle and last
            record = chunk
        elif record is not None:
            record += chunk
        if kind in (1, 4) and record is not None:
            yield record_of(record)
        at += HEAD + length


def rows(data: bytes) -> Iterator[dict[str, Any]]:
    """What was logged, a row of a run at a time."""
    for record in records(data):
        if items := record.history.item:
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def from_the_end(file: Path) -> Iterator[list[dict[str, Any]]]:
    """The last rows in a file, then all of them: most of a long file need not be read to find the last."""
    whole = file.stat().st_size // BLOCK + 1
    with open(file, "rb") as log:
        for blocks in (END, whole):
            log.seek(max(0, whole - blocks) * BLOCK)
            yield list(rows(log.read()))


def last_time(file: Path) -> float:
    """When the last row in a file was logged, in seconds of Unix; minus infinity where there is none."""
    for found in from_the_end(file):
        if times := [row["_timestamp"] for row in found if "_timestamp" in row]:
            return float(times[-1])
    return float("-inf")


def rows_from(file: Path, step: int) -> list[dict[str, Any]]:
    """The rows in a file from one of W&B's own steps on."""
    found: list[dict[str, Any]] = []
    for found in from_the_end(file):
        if found and found[0]["_step"] < step:
            break
    return [row for row in found if row["_step"] >= step]
