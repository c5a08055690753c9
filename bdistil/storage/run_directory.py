"""The run directory: paths of the results of a run, and atomic writes of its rounds and figures.

It holds all results of a run. A round (student, cost, metrics) is written atomically: it is complete or absent. Only
files that a restart recreates are ever deleted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdistil.errors import RunError, UserError
from bdistil.metrics.quality import Task
from bdistil.storage.files import atomic, digest, disk_errors, write_atomically
from bdistil.storage.provenance import differences, updated
from bdistil.storage.run_lock import RunLock
from bdistil.utils import distributed
from bdistil.utils.paths import user_path

FORMAT = 2  # of round.json
CURVE_COLUMNS = (
    "stage", "macs", "link_macs", "params", "train_macs", "val_accuracy", "val_loss", "test_accuracy", "latency_ms",
    "seconds", "accepted_class", "margin_share", "reason",
    "margin_min", "rms_error", "sup_error", "activation_bytes", "area", "violations",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Content of config.yaml, and how it may differ between two starts of one run.

    Attributes:
        values: nested plain values.
        free: dotted keys that may differ, with all below them.
        renewed: dotted keys that may differ, too; their new values replace those in the file.
        complete: adds the defaults of options that a configuration of an earlier version lacks.
    """

    values: Mapping[str, Any]
    free: Sequence[str] = ()
    renewed: Sequence[str] = ()
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


class RunDirectory:
    """The files of one run.

    Args:
        root: folder of the run; `prepare` creates it.

    Attributes:
        root: folder of the run.
        config: the resolved configuration.
        teacher: weights of a teacher that the recipe trained.
        emulation: folder of MEKD, which generates the training set of the rounds.
        curve: one row per prefix, the teacher first.
        picture: accuracy against cost.
        report: summary of the run as one self-contained page.
        calibration: calibration of the committed ensemble; the commit of a further round removes it.
        teacher_checkpoint: Lightning's checkpoint of a teacher in training.
        lock: held by the start that uses the run directory.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = user_path(root, "run_dir")
        self.config = self.root / "config.yaml"
        self.teacher = self.root / "teacher.safetensors"
        self.emulation = self.root / "mekd"
        self.curve = self.root / "curve.csv"
        self.picture = self.root / "curve.png"
        self.report = self.root / "report.html"
        self.calibration = self.root / "anytime.json"
        self.teacher_checkpoint = self.root / "work" / "teacher" / "last.ckpt"
        self.lock = RunLock(self.root / ".lock")

    @property
    def scratch(self) -> Path | None:
        """Node-local folder for ledgers, from BDISTIL_SCRATCH; None if unset."""
        named = os.environ.get("BDISTIL_SCRATCH")
        return user_path(named, "BDISTIL_SCRATCH") if named else None

    @property
    def ledger(self) -> Path:
        """Folder of the ledger's files."""
        if self.scratch is None:
            return self.root / "ledger"
        place = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]
        return self.scratch / f"bdistil-{self.root.name}-{place}" / "ledger"

    def folder(self, number: int) -> Path:
        """Folder of a committed round."""
        return self.root / "rounds" / f"{number:03d}"

    def work(self, number: int) -> Path:
        """Folder of the current round; deleting it costs the training of that round."""
        return self.root / "work" / f"{number:03d}"

    def checkpoint(self, number: int) -> Path:
        """Lightning's checkpoint of the current round."""
        return self.work(number) / "last.ckpt"

    def write(self, name: str, value: Any) -> None:
        """Writes plain values to NAME.json in the run directory.

        Files: `environment` (the starts), `teacher` (its row of the curve), `test` (test accuracy of the teacher, None
        where it was not measured, and of every prefix), `anytime` (the calibration), `stopped`, `work/…/rejected`,
        `work/…/spent`, and `figures` in a comparison.

        Raises:
            RunError: the write failed.
        """
        path = self.root / f"{name}.json"
        with disk_errors(path.name, self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(value, indent=1))

    def read(self, name: str) -> Any:
        """The content of NAME.json, or None where there is no such file."""
        path = self.root / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    # ---- starting

    def prepare(self) -> None:
        """Creates the folder and checks that it is writable.

        Raises:
            UserError: it is not; the message names the folder and the cause.
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

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context that locks the run directory against other starts; processes of one job share the lock.

        Raises:
            UserError: another start uses it, or it is not writable.
        """
        if distributed.early_rank() != 0:
            yield
            return
        self.prepare()
        with self.lock.held():
            yield

    def freeze(self, config: RunConfig) -> None:
        """Writes the configuration of a new run, or compares it with that of the existing run.

        Raises:
            UserError: the existing run has another configuration; the message lists the differences.
        """
        if not self.config.exists() and not self.committed():
            write_atomically(self.config, yaml.safe_dump(dict(config.values), sort_keys=False))
            return
        self.compare(config)

    def renew(self, config: RunConfig) -> None:
        """Writes the values that may change, `config.renewed`, once the checks of a start have passed."""
        there = self.read_config()
        if updated(there, config.values, config.renewed):
            write_atomically(self.config, yaml.safe_dump(there, sort_keys=False))

    def compare(self, config: RunConfig) -> None:
        """Compares a configuration with that of the existing run; see `freeze`."""
        if not self.config.exists():
            raise UserError(
                f"{self.root} holds rounds but no config.yaml: put the file back, or choose another `run_dir`."
            )
        there, now = self.read_config(), yaml.safe_load(yaml.safe_dump(dict(config.values)))
        differing = differences(config.complete(there), config.complete(now), [*config.free, *config.renewed])
        if differing:
            kept = f" Its trained teacher: --model.teacher.checkpoint {self.teacher}." if self.teacher.is_file() else ""
            raise UserError(
                f"`run_dir` {self.root} holds a run of another configuration:\n{differing}\n"
                f"Choose another `run_dir`, or give the values that stand there to go on with that run.{kept}"
            )

    def discard(self) -> None:
        """Removes the files that a start wrote before the run's first commit; the rest of the folder stays.

        A run with committed rounds is left unchanged.
        """
        if self.committed():
            return
        names = ("work", "rounds", "mixing", "noise")
        for folder in (self.ledger, *(self.root / name for name in names)):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.root / "teacher.json", self.root / "environment.json"):
            file.unlink(missing_ok=True)

    def read_config(self) -> dict[str, Any]:
        """Reads config.yaml."""
        return dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))

    def identity(self) -> str:
        """Unique identifier of the run, unlike that of any later run in the same folder; created on first call."""
        path = self.root / "identity.txt"
        if not path.exists():
            write_atomically(path, uuid4().hex)
        return path.read_text()

    def keep_start(self, start: Mapping[str, Any]) -> None:
        """Appends a start of the run to the list in environment.json."""
        self.write("environment", [*(self.read("environment") or []), start])

    # ---- rounds

    def committed(self) -> int:
        """Counts the committed rounds.

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
        """Commits a round atomically.

        Args:
            number: the round, from 0.
            weights: tensors of the student by name.
            record: content of round.json; its format and the weights' size and sha256 are added.

        Raises:
            RunError: the write failed.
        """
        with disk_errors(f"the commit of round {number + 1}", self.root), atomic(self.folder(number)) as folder:
            folder.mkdir(parents=True)
            file = folder / "student.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, file)
            written = {"file": file.name, "bytes": file.stat().st_size, "sha256": digest(file)}
            text = json.dumps({"format": FORMAT, **record, "weights": written}, indent=1)
            (folder / "round.json").write_text(text, encoding="utf-8")
            for stale in (self.root / "test.json", self.calibration):  # they describe the ensemble without this student
                stale.unlink(missing_ok=True)
        shutil.rmtree(self.work(number), ignore_errors=True)

    def record(self, number: int) -> dict[str, Any]:
        """Reads round.json of a committed round.

        Raises:
            RunError: the file is missing, damaged or of another format; it is named.
        """
        path = self.folder(number) / "round.json"
        try:
            record = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, f"is missing or torn ({error})") from error
        if record.get("format") != FORMAT:
            raise RunError(
                f"{path} has format {record.get('format', 'none')}, but this version of bdistil reads format {FORMAT}: "
                "train the run again in a new `run_dir`, or load it with the version that wrote it."
            )
        return record

    def weights(self, number: int) -> dict[str, Tensor]:
        """Reads the student's tensors of a committed round, and compares size and sha256 with its record.

        Raises:
            RunError: the file is missing or damaged; it is named.
        """
        written = self.record(number)["weights"]
        path = self.folder(number) / written["file"]
        if not path.is_file():
            raise _damaged(path, "is missing")
        if (found := path.stat().st_size) != written["bytes"]:
            raise _damaged(path, f"is torn: {found} bytes, {written['bytes']} were written")
        if digest(path) != written["sha256"]:
            raise _damaged(path, "has changed since it was written")
        return load_file(path)

    # ---- the current round, and the end

    def tries(self, number: int) -> list[str]:
        """The reasons why tries of a round were rejected so far, one per rung of the ladder."""
        return list(self.read(f"work/{number:03d}/rejected") or [])

    def spent(self, number: int) -> dict[str, float]:
        """Training MACs, seconds and steps of the tries of a round rejected so far."""
        return {"train_macs": 0, "seconds": 0.0, "steps": 0} | (self.read(f"work/{number:03d}/spent") or {})

    def reject(self, number: int, reason: str, *, train_macs: int = 0, seconds: float = 0.0, steps: int = 0) -> None:
        """Records a rejected try with its reason and cost, and removes its checkpoint."""
        reasons, before = [*self.tries(number), reason], self.spent(number)
        self.checkpoint(number).unlink(missing_ok=True)  # first, so that the next try cannot resume from it
        spent = {"train_macs": train_macs, "seconds": seconds, "steps": steps}
        spent = {key: before[key] + value for key, value in spent.items()}
        self.write(f"work/{number:03d}/spent", spent)
        self.write(f"work/{number:03d}/rejected", reasons)

    def verdicts(self, number: int) -> tuple[int, int]:
        """(committed rounds, rejected tries of a round); changes with every verdict."""
        return self.committed(), len(self.tries(number))

    @property
    def stopped(self) -> str | None:
        """The reason why boosting stopped before the last round, if it did."""
        record = self.read("stopped")
        return str(record["reason"]) if record and record["round"] == self.committed() else None

    def stop(self, number: int, reason: str) -> None:
        """Records that boosting stopped at a round, with the reason."""
        self.write(
            "stopped", {"round": number, "reason": reason, "tries": self.tries(number), "spent": self.spent(number)}
        )

    # ---- figures and the curve

    @property
    def task(self) -> Task:
        """The task of the run, read from its first committed round."""
        record = self.record(0) if self.committed() else {}
        return task_of(record)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the curve, read from the committed rounds: the teacher, then every prefix."""
        teacher = self.read("teacher")
        rows = [teacher] if teacher else []
        rows += [dict(self.record(number)["curve"]) for number in range(self.committed())]
        for row, accuracy in zip(rows, self.read("test") or [], strict=False):
            row["test_accuracy"] = accuracy
        return rows

    def write_curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes curve.csv, the teacher's row first. Missing keys stay empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CURVE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
        with disk_errors("curve.csv", self.root):
            write_atomically(self.curve, text.getvalue())

    def read_curve(self) -> list[dict[str, str]]:
        """The rows of curve.csv as text."""
        with open(self.curve, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def task_of(record: Mapping[str, Any]) -> Task:
    """The task of a run, from round.json; in older files, which lack it, from their offset."""
    task: Task = record.get("task") or ("classification" if record.get("offset") is None else "regression")
    return task


def _damaged(path: Path, state: str) -> RunError:
    return RunError(
        f"{path} of a committed round {state}. Nothing was deleted. "
        f"Put the file back, or remove {path.parent} and all later rounds to train them again."
    )
