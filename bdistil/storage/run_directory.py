"""The run directory: with `run_places` the only code that knows the file names of a run.

A run directory is the truth about a run. A round is in it whole (student, cost, metrics) or not at all: it is written
beside, flushed to the disk, and renamed. Nothing here is ever deleted but what a restart makes again.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.metrics.quality import Task
from bdistil.storage.files import atomic, digest, disk_errors, write_atomically
from bdistil.storage.provenance import differences
from bdistil.storage.run_paths import RunPlaces

CURVE_COLUMNS = (
    "stage", "macs", "link_macs", "params", "train_macs", "val_accuracy", "val_loss", "test_accuracy", "latency_ms",
    "seconds", "accepted_class", "margin_share", "reason",
    "margin_min", "rms_error", "sup_error", "activation_bytes", "area", "violations",
)  # fmt: skip


class RunDirectory(RunPlaces):
    """One run on the disk.

    Args:
        root: the folder of the run; made when the run starts.
    """

    # ---- starting

    def prepare(self) -> None:
        """Makes the folder and proves that it can be written to.

        Raises:
            UserError: it cannot; the message names the folder and the cause.
        """
        try:
            (self.root / "rounds").mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable.{os.getpid()}"
            write_atomically(probe, 4096 * "-")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"`run_dir` {self.root} cannot be written to: {error.strerror or error}. "
                "Give a folder that you may write to, on a disk with room."
            ) from error

    def freeze(self, config: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
        """Keeps the configuration of a new run, or proves that a run found here is of the same one.

        Args:
            config: nested plain values, as they will stand in config.yaml.
            ignore: dotted prefixes of keys that may differ between two starts of the same run.

        Raises:
            UserError: the run here has another configuration; the message lists what differs.
        """
        if not self.config.exists():
            if self.committed():
                raise UserError(
                    f"{self.root} holds rounds but no config.yaml: put the file back, or choose another `run_dir`."
                )
            write_atomically(self.config, yaml.safe_dump(dict(config), sort_keys=False))
            return
        differing = differences(self.read_config(), yaml.safe_load(yaml.safe_dump(dict(config))), ignore)
        if differing:
            raise UserError(
                f"`run_dir` {self.root} holds a run of another configuration:\n{differing}\n"
                "Choose another `run_dir`, or give the values that stand there to go on with that run."
            )

    def identity(self) -> str:
        """What no other run has, not even a later one in the same place; made when it is first asked for."""
        path = self.root / "identity.txt"
        if not path.exists():
            write_atomically(path, uuid4().hex)
        return path.read_text()

    def keep_start(self, start: Mapping[str, Any]) -> None:
        """Adds a start of the run to environment.json, a list with the oldest first."""
        starts = self._kept("environment.json") or []
        self._keep("environment.json", [*starts, start], "the record of this start")

    def _keep(self, name: str, value: Any, what: str) -> None:
        with disk_errors(what, self.root):
            write_atomically(self.root / name, json.dumps(value, indent=1))

    def _kept(self, name: str) -> Any:
        """What `_keep` kept under a name; None where it has kept nothing."""
        path = self.root / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def read_config(self) -> dict[str, Any]:
        """The configuration that was kept."""
        return dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))

    # ---- rounds

    def committed(self) -> int:
        """How many rounds are committed.

        Raises:
            RunError: a folder is missing between two others; it is named, nothing is deleted.
        """
        found = sorted(int(p.name) for p in (self.root / "rounds").glob("[0-9][0-9][0-9]") if p.is_dir())
        if found != list(range(len(found))):
            gap = next(n for n, f in enumerate(found) if n != f)
            raise RunError(
                f"{self.folder(gap)} is missing, but later rounds are there. Put it back, or start a new `run_dir`."
            )
        return len(found)

    def commit(self, number: int, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Commits a round: all of it is there after this call, or nothing.

        Args:
            number: the round, from 0.
            weights: tensors of the student by name.
            record: what round.json says; the weights' size and sha256 are added.

        Raises:
            RunError: the disk refused.
        """
        with disk_errors(f"the commit of round {number}", self.root), atomic(self.folder(number)) as folder:
            folder.mkdir(parents=True)
            file = folder / "student.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, file)
            seal = {"file": file.name, "bytes": file.stat().st_size, "sha256": digest(file)}
            text = json.dumps({**record, "weights": seal}, indent=1)
            (folder / "round.json").write_text(text, encoding="utf-8")
            for stale in ("test.json", "anytime.json"):  # of other students
                (self.root / stale).unlink(missing_ok=True)
        shutil.rmtree(self.work(number), ignore_errors=True)

    def record(self, number: int) -> dict[str, Any]:
        """What round.json of a committed round says.

        Raises:
            RunError: the file is missing or torn; it is named.
        """
        path = self.folder(number) / "round.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} of a committed round is missing or torn ({error}). Nothing was deleted. "
                f"Put the file back, or remove {path.parent} and all later rounds to train them again."
            ) from error

    def weights(self, number: int) -> dict[str, Tensor]:
        """The student's tensors of a committed round, held to the size and sha256 that its record gives.

        Raises:
            RunError: the file is missing or torn; it is named.
        """
        seal = self.record(number)["weights"]
        path = self.folder(number) / seal["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != seal["bytes"] or digest(path) != seal["sha256"]:
            state = "is missing" if found is None else f"is torn: {found} bytes, {seal['bytes']} were written"
            state = "has changed since it was written" if found == seal["bytes"] else state
            raise RunError(
                f"{path} of a committed round {state}. Nothing was deleted. "
                f"Put the file back, or remove {path.parent} and all later rounds to train them again."
            )
        return load_file(path)

    # ---- the teacher

    @property
    def task(self) -> Task:
        """What the run answers, as its first committed round says it."""
        real = self.committed() > 0 and self.record(0).get("offset") is not None
        return "regression" if real else "classification"

    def keep_teacher(self, figures: Mapping[str, Any]) -> None:
        """Keeps the teacher's row of the curve: its cost and its accuracy."""
        self._keep("teacher.json", figures, "the teacher's figures")

    def teacher_figures(self) -> dict[str, Any] | None:
        """The teacher's row of the curve, once it was kept."""
        figures: dict[str, Any] | None = self._kept("teacher.json")
        return figures

    def keep_test(self, accuracy: Sequence[float | None]) -> None:
        """Keeps the test accuracy of the teacher (None where it was not asked) and of every prefix, in this order."""
        self._keep("test.json", list(accuracy), "the test figures")

    def test_figures(self) -> list[float | None] | None:
        """Test accuracy of the teacher and of every prefix, once the run has ended."""
        figures: list[float | None] | None = self._kept("test.json")
        return figures

    # ---- stopping early

    def keep_calibration(self, values: Mapping[str, Any]) -> None:
        """Keeps the calibration of the committed ensemble, see `ensemble.calibration.save_calibration`."""
        self._keep("anytime.json", dict(values), "the calibration")

    @property
    def calibration(self) -> Path:
        """The calibration of the committed ensemble; a commit of a further round removes it."""
        return self.root / "anytime.json"

    # ---- tries of the round under way, and the end

    def tries(self, number: int) -> list[str]:
        """Why the tries of a round so far were rejected, one reason a rung of the ladder."""
        path = self.work(number) / "rejected.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def reject(self, number: int, reason: str) -> None:
        """Records that a try was rejected; its checkpoint goes."""
        reasons = [*self.tries(number), reason]
        self.checkpoint(number).unlink(missing_ok=True)  # first: the next try cannot go on from it
        with disk_errors(f"round {number}", self.root):
            self.work(number).mkdir(parents=True, exist_ok=True)
            write_atomically(self.work(number) / "rejected.json", json.dumps(reasons))

    def verdicts(self, number: int) -> tuple[int, int]:
        """How many rounds are committed, and how many tries of a round rejected: changes with every verdict."""
        return self.committed(), len(self.tries(number))

    @property
    def stopped(self) -> str | None:
        """Why boosting stopped before the last round, if it did."""
        record = self._kept("stopped.json")
        return str(record["reason"]) if record and record["round"] == self.committed() else None

    def stop(self, number: int, reason: str) -> None:
        """Records that boosting stopped at a round, with the reason."""
        record = {"round": number, "reason": reason, "tries": self.tries(number)}
        self._keep("stopped.json", record, "the record of the stop")

    # ---- the curve

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the curve by what is committed: the teacher, then every prefix."""
        teacher = self.teacher_figures()
        rows = [teacher] if teacher else []
        rows += [dict(self.record(number)["curve"]) for number in range(self.committed())]
        for row, accuracy in zip(rows, self.test_figures() or [], strict=False):
            row["test_accuracy"] = accuracy
        return rows

    def write_curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes curve.csv, the teacher's row first. A key that a row lacks stays empty."""
        with disk_errors("curve.csv", self.root):
            text = io.StringIO()
            writer = csv.DictWriter(text, CURVE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({column: _cell(row.get(column)) for column in CURVE_COLUMNS} for row in rows)
            write_atomically(self.curve, text.getvalue())

    def read_curve(self) -> list[dict[str, str]]:
        """The rows of curve.csv as text."""
        with open(self.curve, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
