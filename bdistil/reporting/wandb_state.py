"""What a start of a run notes about its W&B run, for the start after it."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bdistil.reporting.wandb_file import last_time, rows, rows_from

# A row is noted before it is logged, and W&B's own process writes it within FLUSH_SECONDS. What of the notes is not in
# its file after a kill, the next start logs; a process that is held up may be later than that, hence so many.
FLUSH_SECONDS = 0.1
KEPT_SECONDS, KEPT_ROWS = 5.0, 500
FLUSH_SETTING = "x_transaction_log_flush_interval"  # W&B's own, which may drop it: it then writes every 15 s
KEPT_SECONDS_WITHOUT = 20.0
# Rows of W&B that a start leaves free behind those of the start before, for what was logged on the run itself.
ROOM = 1000
NOTHING = {"fitted": -1, "reached": -1, "rows": 0}


class RunNotes:
    """How far the W&B run of a folder is, and the last rows of its fits.

    Attributes:
        fitted: the last step of a fit.
        reached: the last step of all rows.
        kept: for how many seconds a row is noted.
        rows: W&B's own step of the next one, which counts the rows of all starts.
        unsent: a start has logged online, and none since has ended in time for the server to have all.

    Args:
        folder: the run directory; the notes are ``wandb_step.json`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "wandb_step.json"
        self._broken = False
        found = self._found()
        self.fitted, self.reached, self.rows = (found.get(key, none) for key, none in NOTHING.items())
        self.unsent = found.get("unsent", self._broken)
        self._keys = set(found.get("keys", []))  # of the rows at the last step of a fit
        self._log = found.get("log", "")  # W&B's file, from the run directory
        self._tail: deque[tuple[float, str]] = deque(maxlen=KEPT_ROWS)  # when noted, and rows as JSON
        self._owed: list[dict[str, Any]] = found.get("tail", [])
        self._before, self.kept = (self.fitted, self._keys), KEPT_SECONDS

    def _found(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text()) if self._file.exists() else {}
            # A list is of a version before.
            return dict(zip(NOTHING, found, strict=True)) if isinstance(found, list) else dict(found)
        except (OSError, ValueError, TypeError) as error:
            self._broken = True  # as the host itself crashed: a row does not wait for the disk
            rank_zero_warn(f"{self._file} cannot be read, W&B goes on from its own files. {error}")
            return {}

    def begin(self, log: Path | None, known: int | None = None) -> list[dict[str, Any]]:
        """Turns to the file that W&B writes from now on. Gives the rows that are to be logged again.

        Args:
            log: the file.
            known: the step of W&B's own up to which the server has rows; None offline, where files are all there is.

        Returns:
            Rows that the file before lacks, or the server, the oldest first.
        """
        if self._broken and log:
            self._read_again(log)
        again = self._missing() if known is None or not log else [*self._not_uploaded(log, known), *self._missing()]
        missing = [*{row["_timestamp"]: row for row in again}.values()]  # a start that was killed logged some as well
        self._log = os.path.relpath(log, self._folder) if log else ""
        if known is not None:
            self.unsent, self.rows = True, max(self.rows, known)
        if self.rows > 0:  # noted before one is logged, or a start that is killed by then is not counted
            self.rows += ROOM + len(missing)
        self._tail.extend((time.time(), json.dumps(row)) for row in missing)
        self._save()
        return missing

    def _read_again(self, log: Path) -> None:
        """Takes from the files of the starts before what the notes would have said, without what these lack."""
        for file in log.parent.parent.glob(f"*run-*/{log.name}"):
            for row in rows(file.read_bytes()):
                self.rows = max(self.rows, int(row.get("_step", 0)) + 1)
                step = int(row.get("trainer/global_step", -1))
                self.reached = max(self.reached, step)
                if "round" not in row and step >= self.fitted:
                    self._keys = row.keys() | (set() if step > self.fitted else self._keys)
                    self.fitted = step
        self._before = self.fitted, self._keys

    def _not_uploaded(self, log: Path, known: int) -> Iterator[dict[str, Any]]:
        """Numbers that starts before have logged online, too late for the server. Users sync offline ones."""
        for file in sorted(log.parent.parent.glob(f"run-*/{log.name}")):
            try:
                late = rows_from(file, known) if file != log else []
            except Exception as error:
                rank_zero_warn(f"{file} cannot be read: the server may lack its last rows. {error}")
                continue
            for row in late:
                numbers = {key: value for key, value in _numbers(row).items() if key not in ("_step", "_runtime")}
                if "_timestamp" in row and numbers.keys() - {"_timestamp", "trainer/global_step"}:
                    yield numbers

    def _missing(self) -> list[dict[str, Any]]:
        if not self._owed:
            return []
        try:
            written = last_time(self._folder / self._log)
        except FileNotFoundError:  # deleted after `wandb sync`
            return []
        except Exception as error:
            rank_zero_warn(
                f"What the start before has logged to W&B in its last seconds may be lost, as its file "
                f"{self._log or '(of unknown name)'} cannot be read. {type(error).__name__}: {error}"
            )
            return []
        return [row for row in self._owed if row["_timestamp"] > written]

    def shown(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Whether the starts before have shown a row of a fit. A kill may have come between two rows of one step."""
        fitted, keys = self._before
        return step < fitted or (step == fitted and keys >= metrics.keys())

    def add(self, metrics: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """Notes a row that is about to be logged, and gives it with the time by which it is found again."""
        row = {**metrics, "_timestamp": time.time()}
        self.reached, self.rows = max(self.reached, step or 0), self.rows + 1
        if "round" not in metrics:  # rows of rounds are logged again from their own files
            self._keep(row, step)
        self._save()
        return row

    def _keep(self, row: dict[str, Any], step: int | None) -> None:
        numbers = _numbers(row)
        if step is not None:
            self._keys = row.keys() | (set() if step > self.fitted else self._keys)
            self.fitted = max(self.fitted, step)
            numbers["trainer/global_step"] = step  # as WandbLogger has it
        self._tail.append((row["_timestamp"], json.dumps(numbers)))

    def sent(self) -> None:
        """Notes that the server has all rows, as far as one can know."""
        self.unsent = False
        self._save()

    def _save(self) -> None:
        while self._tail and self._tail[0][0] < self._tail[-1][0] - self.kept:
            self._tail.popleft()
        numbers = {"fitted": self.fitted, "reached": self.reached, "rows": self.rows, "unsent": self.unsent}
        head = json.dumps({**numbers, "keys": [*self._keys], "log": self._log})
        tail = ", ".join(row for _, row in self._tail)
        beside = self._file.with_name(".wandb_step.tmp")
        beside.write_text(f'{head[:-1]}, "tail": [{tail}]}}')
        os.replace(beside, self._file)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}
