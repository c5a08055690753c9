"""Reads the file of an offline run of W&B.

A ``.wandb`` file is a log in LevelDB's format, after a header of seven bytes: blocks of 32 KiB, in them chunks with a
header of checksum, length and kind. A record, a protobuf message of W&B, is one chunk or several.
"""

import json
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

HEADER, BLOCK = 7, 32 * 1024  # bytes; the header of the file is as long as that of a chunk


@dataclass
class OfflineRun:
    """What is in one file. The exit code of a run that was killed is None."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # x axis and summaries by name or glob
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs below a folder, the oldest first."""
    files = sorted(folder.rglob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [_read(file.read_bytes()) for file in files]


def finished_runs(folder: Path, seconds: float = 20.0) -> list[OfflineRun]:
    """The same, once all have their exit code: a process of W&B's own writes the file, after `finish` too."""
    end = time.monotonic() + seconds
    runs = offline_runs(folder)
    while any(run.exit_code is None for run in runs) and time.monotonic() < end:
        time.sleep(0.1)
        runs = offline_runs(folder)
    return runs


def records(data: bytes) -> Iterator[Any]:
    """The records in a file, up to the point where a kill has torn it."""
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left  # padding: no header fits into the rest of the block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + HEADER : at + HEADER + length]
        if kind == 0 or len(chunk) < length:
            return
        record = chunk if kind in (1, 2) else record + chunk  # 1 is a whole record; 2 to 4 are first, middle and last
        if kind in (1, 4):
            yield messages.Record.FromString(record)
        at += HEADER + length


def _read(data: bytes) -> OfflineRun:
    found = OfflineRun()
    for record in records(data):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = {key: getattr(record.run, key) for key in ("run_id", "run_group", "job_type", "project")}
            found.run |= {"name": record.run.display_name, "tags": list(record.run.tags)}
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "metric":
            kept = [option.name for option, _ in record.metric.summary.ListFields()]
            found.metrics[record.metric.name or record.metric.glob_name] = (record.metric.step_metric, kept)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        if (artifact := record.artifact).name or (artifact := record.request.log_artifact.artifact).name:
            files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
            about = {"name": artifact.name, "type": artifact.type, "metadata": json.loads(artifact.metadata or "{}")}
            found.artifacts.append({**about, "aliases": set(artifact.aliases), "files": files})
        found.config |= _items(record.run.config.update) | _items(record.config.update)
        found.summary |= _items(record.summary.update)
    return found


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
