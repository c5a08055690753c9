"""A ledger on a disk of each node, where BDISTIL_SCRATCH names one; the run directory stays the truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdistil.boosting.part import Part
from bdistil.storage.files import write_atomically
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils import distributed


def claim(run: RunDirectory, parts: Sequence[Part]) -> None:
    """Finds who shares a node's disk, and removes from it what is not of this run and its committed rounds.

    A node may come back after rounds that it took no part in, or the run may have been started anew: what is removed
    is made again, from the teacher and the committed students.

    Args:
        run: the run, with its ledger on a scratch disk.
        parts: training and validation part; they get to know the sharers.
    """
    history = distributed.from_first(_history(run) if distributed.rank() == 0 else None)
    sharers = distributed.sharers_of(run.ledger)
    with distributed.within(sharers):
        if distributed.rank() == 0:
            _clear(run.ledger, history, going_on=parts[0].ledger.version >= 0)
        distributed.barrier()
    for part in parts:
        part.sharers = sharers


def _history(run: RunDirectory) -> dict[str, Any]:
    """The run, and the weights of its committed rounds."""
    seals = [run.record(number)["weights"]["sha256"] for number in range(run.committed())]
    return {"run": run.identity(), "rounds": seals}


def _clear(folder: Path, history: Mapping[str, Any], *, going_on: bool) -> None:
    """Makes a folder that of a history. A process that is going on has itself written what the last round added."""
    owner = folder / "owner.json"
    folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(owner.read_text()) if owner.exists() else {"run": None}
    if found["run"] != history["run"]:
        for part in ("train", "val"):
            shutil.rmtree(folder / part, ignore_errors=True)
    elif found["rounds"] != history["rounds"] and not going_on:
        for file in [*folder.rglob("error.*"), *folder.rglob("features.*")]:
            file.unlink()
    write_atomically(owner, json.dumps(history))
