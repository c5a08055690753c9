"""The ledger: teacher logits g and running error S of every sample, in files, addressed by sample index.

S = sum over committed students of (f_s - g) is all that the game has to remember: its weights are two exponentials and
L log-normalisers away, and S / t is the error of the prefix of t students. Files are memory-mapped, so a process holds
the rows of a batch, not the N of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil import distributed, row_files
from bdistil.errors import RunError, UserError
from bdistil.functional import centre, game_rows, log_normaliser
from bdistil.units import Task, Units

# Rows that are scored at once; whole blocks go to one process, whatever the number of processes.
BLOCK = 512


@dataclass(frozen=True)
class LedgerHead:
    """What is known of all rows: N samples, L outputs, their units, and the largest value in these."""

    samples: int
    outputs: int
    scale: float | tuple[float, ...]
    offset: tuple[float, ...] | None
    largest: float
    teacher: str


@dataclass(frozen=True)
class RoundEvidence:
    """What one pass of a student over all samples says of it.

    Attributes:
        margin_share: share of the L outputs whose margin is at least -tolerance * b.
        margin_min: smallest margin.
        rms_before: rms error to the teacher of the prefix without the student; of round 0, of a constant answer.
        rms_after: the same with the student.
        sup_after: largest error to the teacher of the prefix with the student.
    """

    margin_share: float
    margin_min: float
    rms_before: float
    rms_after: float
    sup_after: float


class ErrorLedger:
    """g and S by sample index, both (N, L) float32, in one folder.

    Logits of the teacher are centred per sample and divided by their rms over all samples, so that settings mean the
    same for any teacher. Outputs of a regression lose their mean over the samples and are divided by their standard
    deviation, each output by its own. `units` are these numbers.

    Args:
        folder: where the files are; made by `create`.
    """

    head: LedgerHead

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.version = -1
        self._log_z: dict[float, Tensor] = {}

    # ---- files

    @property
    def _head_file(self) -> Path:
        return self.folder / "ledger.json"

    @property
    def _teacher_file(self) -> Path:
        return self.folder / "teacher.f32"

    def _error_file(self, version: int) -> Path:
        return self.folder / f"error.{version:03d}.f32"

    @property
    def _next_file(self) -> Path:
        return self.folder / "error.next.tmp"

    @property
    def _shape(self) -> tuple[int, int]:
        return self.samples, self.outputs

    # ---- making and opening

    @property
    def exists(self) -> bool:
        """Are the teacher's logits here?"""
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
            task: of classes, or of real outputs.
            units: where they are given by another ledger (that of the training part).

        Raises:
            RunError: a logit is NaN or infinite; the first sample is named.
        """
        self.head = LedgerHead(samples, outputs, 1.0, None, 0.0, teacher)
        beside = self.folder / "teacher.f32.tmp"
        target = row_files.blank(beside, self._shape)
        for low, rows in logits:
            rows = rows.detach().float().cpu()
            _refuse_nonfinite(rows, low, "the teacher's logits")
            target[low : low + len(rows)] = (centre(rows) if task == "classification" else rows).numpy()
        units = units or _measured(target, task)
        largest = torch.zeros(())
        scale, offset = np.asarray(units.scale, np.float32), np.asarray(units.offset or 0.0, np.float32)
        for low, high in distributed.my_blocks(samples, BLOCK):
            target[low:high] -= offset
            target[low:high] /= scale
            largest = torch.maximum(largest, torch.tensor(np.abs(target[low:high]).max()))
        row_files.name(beside, self._teacher_file)
        bound = float(distributed.all_max(largest))
        self.head = LedgerHead(samples, outputs, units.scale, units.offset, bound, teacher)
        if distributed.rank() == 0:
            text = json.dumps(asdict(self.head), indent=1)
            (self.folder / "ledger.json.tmp").write_text(text)
            os.replace(self.folder / "ledger.json.tmp", self._head_file)
        distributed.barrier()

    def open(self, samples: int, teacher: str = "") -> None:
        """Opens what `create` wrote.

        Raises:
            UserError: N or the teacher is another than at the start of the run.
            RunError: a file is torn.
        """
        try:
            head: Any = json.loads(self._head_file.read_text()).items()
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in head}
            self.head = LedgerHead(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self._head_file} is missing or torn ({error}). Nothing was deleted. "
                f"Remove {self.folder} to have the teacher asked again."
            ) from error
        part = "validation" if self.folder.name == "val" else "training"
        if self.samples != samples:
            raise UserError(
                f"The {part} dataset has {samples} samples, but the run in {self.folder.parent} was started with "
                f"{self.samples}. Give the dataset it was started with, or choose another `run_dir`."
            )
        if teacher and self.head.teacher and teacher != self.head.teacher:
            raise UserError(
                f"The teacher's weights differ from those that the run in {self.folder.parent} was started with. "
                "Give that teacher, or choose another `run_dir`."
            )
        size = self._teacher_file.stat().st_size if self._teacher_file.exists() else 0
        if size != self.samples * self.outputs * 4:
            raise RunError(
                f"{self._teacher_file} is missing or torn: {size} bytes, {self.samples * self.outputs * 4} expected. "
                f"Nothing was deleted. Remove {self.folder} to have the teacher asked again."
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
        """What the numbers of this ledger are in the teacher's units."""
        return Units(self.head.scale, self.head.offset)

    @property
    def bound(self) -> float:
        """b = 2 max|g|, in units of the ledger."""
        return 2.0 * self.head.largest

    # ---- versions of S

    def has(self, version: int) -> bool:
        """Is S after `version` rounds here, whole?"""
        return version == 0 or row_files.whole(self._error_file(version), self._shape)

    def use(self, version: int) -> None:
        """Opens S after `version` rounds; other versions are removed, as a restart can make them again."""
        if version == 0 and not self._error_file(0).exists():
            row_files.blank(self._next_file, self._shape)
            row_files.name(self._next_file, self._error_file(0))
        if not self.has(version):
            raise RunError(f"{self._error_file(version)} is missing or torn.")
        self.version, self._log_z = version, {}
        self._g = row_files.mapped(self._teacher_file, self._shape)
        self._s = row_files.mapped(self._error_file(version), self._shape)
        distributed.barrier()
        if distributed.rank() == 0:
            for path in self.folder.glob("error.*"):
                if path != self._error_file(version):
                    path.unlink(missing_ok=True)

    def advance(self, answers: Iterable[tuple[int, Tensor]], *, eta: float, tolerance: float) -> RoundEvidence:
        """One pass of a new student over all samples: S of the next version, and what it says of the student.

        The new version has no name before `keep` gives it one.

        Args:
            answers: (first row, student logits in units of the ledger (rows, L)) of the rows of this process.
            eta: step size of the game, for the margins.
            tolerance: a margin is met from -tolerance * b on.

        Raises:
            RunError: an answer is NaN or infinite; the first sample is named.
        """
        target = row_files.blank(self._next_file, self._shape)
        margins, squares, largest = _sums(self.samples, self.outputs), _sums(self.samples, 2), torch.zeros(())
        log_z = self.log_normaliser(eta)
        for low, rows in answers:
            g, s = self._slice(low, low + len(rows))
            deviation = rows.detach().float().cpu() - g
            _refuse_nonfinite(deviation, low, "the student's logits")
            up, down = game_rows(s.double(), log_z, eta)
            margins[low // BLOCK] = ((up - down) * deviation).sum(0)
            before = s if self.version else g
            new = s + deviation
            squares[low // BLOCK] = torch.stack((before.double().square().sum(), new.double().square().sum()))
            largest = torch.maximum(largest, new.abs().max())
            target[low : low + len(rows)] = new.numpy()
        margin, square = distributed.all_sum(margins).sum(0), distributed.all_sum(squares).sum(0)
        largest = distributed.all_max(largest)
        rms = (square / (self.samples * self.outputs)).sqrt()
        return RoundEvidence(
            margin_share=float((margin >= -tolerance * self.bound).double().mean()),
            margin_min=float(margin.min()),
            rms_before=float(rms[0]) / max(self.version, 1),
            rms_after=float(rms[1]) / (self.version + 1),
            sup_after=float(largest) / (self.version + 1),
        )

    def keep(self) -> None:
        """Gives the version that `advance` wrote its name. It counts once the round is committed."""
        row_files.name(self._next_file, self._error_file(self.version + 1))

    # ---- reading

    def _slice(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        # A copy: torch must not hold on to a read-only map.
        return torch.from_numpy(np.array(self._g[low:high])), torch.from_numpy(np.array(self._s[low:high]))

    def rows(self, index: Tensor | np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """g and S of a batch, both (B, L) float32 on the CPU.

        Args:
            index: sample numbers, shape (B,); one that is on the CPU costs no wait for a device.

        Raises:
            UserError: a number is not in 0 … N-1.
        """
        wanted = index.cpu().numpy() if isinstance(index, Tensor) else index
        try:
            if len(wanted) and wanted.min() < 0:  # NumPy would count from the end
                raise IndexError
            return torch.from_numpy(self._g.take(wanted, 0)), torch.from_numpy(self._s.take(wanted, 0))
        except IndexError:
            bad = int(wanted[(wanted < 0) | (wanted >= self.samples)][0])
            message = f"Expected each sample index to be in 0 … {self.samples - 1}, got {bad}."
            raise UserError(message) from None

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, g, S) of the rows of this process, block by block."""
        for low, high in distributed.my_blocks(self.samples, BLOCK):
            yield low, *self._slice(low, high)

    def log_normaliser(self, eta: float) -> Tensor:
        """log Z of the open version, shape (L,) float64: made once in one pass over S, then kept.

        Every process runs over the whole map in the same order, so all hold the same bits.

        Raises:
            RunError: S holds NaN or infinity.
        """
        if eta not in self._log_z:
            total = torch.full((self.outputs,), -torch.inf, dtype=torch.float64)
            for low in range(0, self.samples, 8 * BLOCK):
                part = torch.from_numpy(self._s[low : low + 8 * BLOCK].astype(np.float64))
                _refuse_nonfinite(
                    part, low, f"the ledger ({self._error_file(self.version)})", "Remove that file: it is made again."
                )
                total = torch.logaddexp(total, log_normaliser(part, eta))
            self._log_z[eta] = total
        return self._log_z[eta]


def _measured(target: np.ndarray[Any, Any], task: Task) -> Units:
    """Units of the rows (N, L) that the processes have written, so that a number of the ledger has rms 1.

    Raises:
        RunError: all rows are the same.
    """
    samples, outputs = target.shape
    mean = torch.zeros(outputs, dtype=torch.float64)
    if task == "regression":
        mean = _over_blocks(target, lambda rows: rows) / samples
    squares = _over_blocks(target, lambda rows: (rows - mean).square()) / samples
    if task == "regression":
        sd = squares.sqrt().where(squares.sqrt() > 1e-6 * mean.abs(), 0.0)  # what rounding leaves of a constant output
        same, units = bool((sd == 0).all()), Units(tuple(sd.where(sd > 0, 1.0).tolist()), tuple(mean.tolist()))
    else:
        same, units = bool((squares == 0).all()), Units(float(squares.mean()) ** 0.5)
    if same:
        raise RunError("The teacher gives the same answer for every sample: there is nothing to distil.")
    return units


def _over_blocks(target: np.ndarray[Any, Any], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all samples of a function of rows (rows, L), shape (L,) float64, the same bits in every process."""
    sums = _sums(*target.shape)
    for low, high in distributed.my_blocks(len(target), BLOCK):
        sums[low // BLOCK] = of(torch.from_numpy(target[low:high].astype(np.float64))).sum(0)
    return distributed.all_sum(sums).sum(0)


def _sums(samples: int, columns: int) -> Tensor:
    """Zeros for a sum of every block: added up in one order, whatever process made it, they give the same bits."""
    return torch.zeros(-(-samples // BLOCK), columns, dtype=torch.float64)


LOWER = "A lower learning rate or float32 precision is the usual cure."


def _refuse_nonfinite(rows: Tensor, low: int, what: str, cure: str = LOWER) -> None:
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).any(-1).nonzero()[0, 0])
        raise RunError(
            f"NaN or infinity in {what}, first at sample {low + bad}. Nothing of this round was committed; the rounds "
            f"before it are intact. {cure}"
        )
