"""The ledger: teacher logits g and running error S of all samples, on disk, by sample index.

S = sum over committed students of (f_s - g) is the whole state of the game: its weights are two exponentials of S and L
log-normalisers, and S / t is the error of the prefix of t students. Memory is bounded by a batch of rows, whatever N.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bdistil.boosting.ledger import passes
from bdistil.boosting.ledger.records import LedgerHead, RoundEvidence, Units
from bdistil.boosting.ledger.reductions import largest_finite
from bdistil.boosting.ledger.rows import Array, RowFile, Storage, allocate, is_complete, publish, size_of
from bdistil.errors import RunError
from bdistil.functional.distillation import centre
from bdistil.metrics.quality import Task
from bdistil.utils import distributed


class ErrorLedger:
    """g and S by sample index, both (N, L), in the files of one folder; read as float32.

    Logits of a classifier are centred per sample and divided by their rms over all samples, so that settings have the
    same meaning for any teacher. Outputs of a regression are standardised, each with its own mean and standard
    deviation. `units` holds these numbers.

    Args:
        folder: folder of the files; created by `create`.
        storage: dtype on disk; arithmetic is in float32. ``float16`` halves the size of the files and rounds each
            number to 11 bits; numbers beyond 65504 are rejected.

    Example:
        >>> import tempfile
        >>> import torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> ledger = ErrorLedger(folder.name)
        >>> ledger.create(2, [(0, torch.tensor([[1.0, -1.0], [3.0, 5.0]]))], outputs=2)
        >>> ledger.use(0)  # S is 0
        >>> evidence = ledger.advance([(0, torch.tensor([[0.5, -0.5], [-1.0, 1.0]]))], eta=0.5, tolerance=1e-3)
        >>> evidence.rms_before, round(evidence.rms_after, 3)
        (1.0, 0.354)
        >>> ledger.publish()
        >>> ledger.use(1)
        >>> g, s = ledger.rows(torch.tensor([0]))
        >>> g, s
        (tensor([[ 1., -1.]]), tensor([[-0.5000,  0.5000]]))
        >>> folder.cleanup()
    """

    head: LedgerHead

    def __init__(self, folder: str | os.PathLike[str], storage: Storage = "float32") -> None:
        self.folder, self.storage = Path(folder), storage
        self.version = -1
        self._log_z: dict[float, Tensor] = {}
        self._next_log_z: dict[float, Tensor] = {}

    # ---- files

    @property
    def _head_file(self) -> Path:
        return self.folder / "ledger.json"

    @property
    def _teacher_file(self) -> Path:
        return self.folder / f"teacher.{self._suffix}"

    def _error_file(self, version: int) -> Path:
        return self.folder / f"error.{version:03d}.{self._suffix}"

    @property
    def _next_file(self) -> Path:
        return self.folder / "error.next.tmp"

    @property
    def _suffix(self) -> str:
        return self.storage.replace("float", "f")

    @property
    def _shape(self) -> tuple[int, int]:
        return self.samples, self.outputs

    # ---- create and open

    @property
    def exists(self) -> bool:
        """Whether the teacher's logits have been written."""
        return self._head_file.exists()

    def create(
        self,
        samples: int,
        logits: Iterable[tuple[int, Tensor]],
        *,
        outputs: int,
        teacher: str = "",
        task: Task = "classification",
        units: Units | None = None,
    ) -> None:
        """Writes the teacher's logits; S is 0.

        Args:
            samples: N.
            logits: (first row, teacher logits (rows, L)) of the rows of this process (`distributed.my_blocks`).
            outputs: L.
            teacher: fingerprint of the teacher, compared at the next start.
            task: task of the run.
            units: units of another ledger (that of the training part), instead of measured ones.

        Raises:
            RunError: a logit is NaN or infinite (names the first such sample), or all rows are equal.
        """
        raw = allocate(self.folder / "teacher.raw.tmp", (samples, outputs))
        for low, rows in logits:
            rows = rows.detach().float().cpu()
            largest_finite(rows, low, "the teacher's logits")
            raw.write(low, centre(rows) if task == "classification" else rows)
        units = units or passes.measure_units(raw, task)
        scaled = allocate(self.folder / "teacher.next.tmp", (samples, outputs), self.storage)
        largest = passes.scale_rows(raw, scaled, units)
        publish(scaled.path, self._teacher_file)
        self.head = LedgerHead(samples, outputs, units.scale, units.offset, largest, teacher)
        if distributed.rank() == 0:
            raw.path.unlink()
            self.head.write(self._head_file)
        distributed.barrier()

    def open(self, samples: int, teacher: str = "") -> None:
        """Opens the files that `create` wrote.

        Raises:
            UserError: N or the teacher differs from the start of the run.
            RunError: a file is torn.
        """
        self.head = LedgerHead.read(self._head_file)
        self.head.refuse_others(self.folder, samples, teacher)
        expected = size_of(self._shape, self.storage)
        size = self._teacher_file.stat().st_size if self._teacher_file.exists() else 0
        if size != expected:
            raise RunError(
                f"{self._teacher_file} is missing or torn: {size} bytes, {expected} expected. Nothing was deleted. "
                f"Remove {self.folder}: the teacher's logits are then computed again."
            )

    @property
    def samples(self) -> int:
        """N."""
        return self.head.samples

    @property
    def outputs(self) -> int:
        """L."""
        return self.head.outputs

    @property
    def units(self) -> Units:
        """Units of this ledger, expressed in the teacher's units."""
        return Units(self.head.scale, self.head.offset)

    @property
    def bound(self) -> float:
        """b = 2 max|g|, in units of the ledger."""
        return 2.0 * self.head.largest

    # ---- versions of S

    def has(self, version: int) -> bool:
        """Whether S after `version` rounds is complete on disk."""
        return version == 0 or is_complete(self._error_file(version), self._shape, self.storage)

    def use(self, version: int) -> None:
        """Opens g and S after `version` rounds, and removes other versions of S, which a restart can recompute.

        Raises:
            RunError: the version is missing or torn.
        """
        if version == 0 and not distributed.all_true(self._error_file(0).exists()):  # each node may have a disk
            allocate(self._next_file, self._shape, self.storage)
            publish(self._next_file, self._error_file(0))
        if not self.has(version):
            raise RunError(f"{self._error_file(version)} is missing or torn.")
        self._log_z = self._next_log_z if version == self.version + 1 else {}
        self.version, self._next_log_z = version, {}
        self._g = RowFile(self._teacher_file, self._shape, self.storage)
        self._s = RowFile(self._error_file(version), self._shape, self.storage)
        distributed.barrier()
        if distributed.rank() == 0:
            for path in self.folder.glob("error.*"):
                if path != self._error_file(version):
                    path.unlink(missing_ok=True)

    def advance(self, logits: Iterable[tuple[int, Tensor]], *, eta: float, tolerance: float) -> RoundEvidence:
        """Writes S with a new student, in one pass over all samples. `publish` makes it the next version.

        Args:
            logits: (first row, student logits in units of the ledger (rows, L)) of the rows of this process.
            eta: step size of the game, for the margins.
            tolerance: a margin of at least -tolerance * b counts as met.

        Raises:
            RunError: a logit is NaN or infinite; names the first such sample.
        """
        state = passes.GameState(self._g, self._s, self.version, eta, self.log_normaliser(eta))
        target = allocate(self._next_file, self._shape, self.storage)
        evidence, log_z = passes.advance(state, target, logits, -tolerance * self.bound)
        self._next_log_z = {eta: log_z}
        return evidence

    def publish(self) -> None:
        """Publishes what `advance` wrote as the next version of S, which becomes valid when the round is committed."""
        publish(self._next_file, self._error_file(self.version + 1))

    # ---- reading

    def rows(self, index: Tensor | np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """g and S of a batch, both (B, L) float32 on the CPU.

        Args:
            index: sample numbers, shape (B,); on the CPU they need no synchronisation with a device.

        Raises:
            UserError: a number is not in 0 … N-1.
        """
        wanted = index.cpu().numpy() if isinstance(index, Tensor) else index
        return self._g.gather(wanted), self._s.gather(wanted)

    def teacher_logits(self, index: Array) -> Tensor:
        """g of a batch, (B, L) float32 on the CPU; no version of S needs to be open."""
        return RowFile(self._teacher_file, self._shape, self.storage).gather(index)

    def log_normaliser(self, eta: float) -> Tensor:
        """log Z of the open version, shape (L,) float64; computed by `advance`, or in one pass over S, then cached.

        Raises:
            RunError: S contains NaN or infinity.
        """
        if eta not in self._log_z:
            self._log_z[eta] = passes.log_normaliser(self._s, eta)
        return self._log_z[eta]
