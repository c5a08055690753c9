"""The ledger: teacher logits g and running error S of every sample, in files, addressed by sample index.

S = sum over committed students of (f_s - g) is all that the game has to remember: its weights are two exponentials and
L log-normalisers away, and S / t is the error of the prefix of t students. Files are mapped or, where they are large,
read by rows, so a process holds the rows of a batch, not the N of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.records import LedgerHead, RoundEvidence
from bdistil.boosting.ledger.reductions import (
    BLOCK,
    block_sums,
    joined,
    joined_normalisers,
    measured_units,
    refuse_nonfinite,
)
from bdistil.boosting.ledger.units import Units
from bdistil.boosting.ledger.update import Pass, Scratch, Sums
from bdistil.errors import RunError, UserError
from bdistil.functional.distillation import centre
from bdistil.metrics.quality import Task
from bdistil.utils import distributed
from bdistil.utils.threads import ordered_map

# Numbers that are worked on at once: a block of a thousand outputs.
PIECE = 1 << 19
# Bytes that are read at once where they are decoded at once: fewer than a core has of its own memory.
CACHED = 1 << 18
# Threads that share a pass over a ledger that is not held in memory, the caller too; more wait for the disk.
THREADS = 4


class ErrorLedger:
    """g and S by sample index, both (N, L), in one folder; read as float32.

    Logits of the teacher are centred per sample and divided by their rms over all samples, so that settings mean the
    same for any teacher. Outputs of a regression lose their mean over the samples and are divided by their standard
    deviation, each output by its own. `units` are these numbers.

    A file larger than `row_files.LARGE` is not held in memory: a process keeps a batch of its rows, whatever N.

    Args:
        folder: where the files are; made by `create`.
        storage: of the numbers on the disk; ``int16`` halves the room, at an error in g and S of 1.5e-5 of the largest
            number of a row.
    """

    head: LedgerHead

    def __init__(self, folder: str | os.PathLike[str], storage: row_files.Storage = "float32") -> None:
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
        return self.folder / f"teacher.{self._kind}"

    def _error_file(self, version: int) -> Path:
        return self.folder / f"error.{version:03d}.{self._kind}"

    @property
    def _kind(self) -> str:
        return {"float32": "f32", "int16": "i16"}[self.storage]

    @property
    def _bytes(self) -> int:
        return row_files.size_of(self._shape, self.storage)

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
        beside, rounded = self.folder / "teacher.next.tmp", self.folder / "teacher.rounded.tmp"
        target = row_files.blank(beside, self._shape)
        for low, rows in logits:
            rows = rows.detach().float().cpu()
            refuse_nonfinite(rows, low, "the teacher's logits")
            target[low : low + len(rows)] = (centre(rows) if task == "classification" else rows).numpy()
        units = units or measured_units(target, task)
        largest = torch.zeros(())
        scale, offset = np.asarray(units.scale, np.float32), np.asarray(units.offset or 0.0, np.float32)
        kept = target if self.storage == "float32" else row_files.blank(rounded, self._shape, self.storage)
        for low, high in distributed.my_blocks(samples, BLOCK):
            part = torch.from_numpy((target[low:high] - offset) / scale)
            largest = torch.maximum(largest, part.abs().amax())
            kept[low:high] = row_files.encoded(part, self.storage)[0]
        row_files.name(beside if kept is target else rounded, self._teacher_file)
        beside.unlink(missing_ok=True)
        bound = float(distributed.all_max(largest))
        self.head = LedgerHead(samples, outputs, units.scale, units.offset, bound, teacher)
        if distributed.rank() == 0:
            self.head.write(self._head_file)
        distributed.barrier()

    def open(self, samples: int, teacher: str = "") -> None:
        """Opens what `create` wrote.

        Raises:
            UserError: N or the teacher is another than at the start of the run.
            RunError: a file is torn.
        """
        self.head = LedgerHead.read(self._head_file)
        self.head.refuse_others(self.folder, samples, teacher)
        size = self._teacher_file.stat().st_size if self._teacher_file.exists() else 0
        if size != self._bytes:
            raise RunError(
                f"{self._teacher_file} is missing or torn: {size} bytes, {self._bytes} expected. "
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
        return version == 0 or row_files.whole(self._error_file(version), self._shape, self.storage)

    def use(self, version: int) -> None:
        """Opens S after `version` rounds; other versions are removed, as a restart can make them again."""
        if version == 0 and not self._error_file(0).exists():
            row_files.blank(self._next_file, self._shape, self.storage)
            row_files.name(self._next_file, self._error_file(0))
        if not self.has(version):
            raise RunError(f"{self._error_file(version)} is missing or torn.")
        self._log_z = self._next_log_z if version == self.version + 1 else {}
        self.version, self._next_log_z = version, {}
        self._g = row_files.mapped(self._teacher_file, self._shape, dtype=self.storage)
        self._s = row_files.mapped(self._error_file(version), self._shape, dtype=self.storage)
        distributed.barrier()
        if distributed.rank() == 0:
            for path in self.folder.glob("error.*"):
                if path != self._error_file(version):
                    path.unlink(missing_ok=True)

    def look(self) -> None:
        """Opens g alone: of a view on which S is not defined."""
        self._g = row_files.mapped(self._teacher_file, self._shape, dtype=self.storage)

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
        target = row_files.blank(self._next_file, self._shape, self.storage)
        margins, squares = block_sums(self.samples, self.outputs), block_sums(self.samples, 2)
        normalisers, largest = block_sums(self.samples, self.outputs) - np.inf, 0.0
        work = Pass(self._g, self._s, eta, self.storage, self.log_normaliser(eta), first=not self.version)
        spare = [self._scratch() for _ in range(self._threads or 1)]

        def step(piece: tuple[int, Tensor]) -> tuple[int, Sums]:
            low, rows = piece
            scratch = spare.pop()
            try:
                return low // BLOCK, work.advance(low, rows.detach().float().cpu(), target, scratch)
            finally:
                spare.append(scratch)

        with row_files.flushed_meanwhile(target):
            for block, sums in ordered_map(step, self._small(answers), threads=self._threads):
                margins[block] += sums.margins
                squares[block] += sums.squares
                largest = max(largest, sums.largest)
                np.logaddexp(normalisers[block], sums.log_normaliser, out=normalisers[block])
        self._next_log_z = {eta: joined_normalisers(normalisers)}
        margin, square = joined(margins), joined(squares)
        largest = float(distributed.all_max(torch.tensor(largest)))
        rms = (square / (self.samples * self.outputs)).sqrt()
        return RoundEvidence(
            margin_share=float((margin >= -tolerance * self.bound).double().mean()),
            margin_min=float(margin.min()),
            rms_before=float(rms[0]) / max(self.version, 1),
            rms_after=float(rms[1]) / (self.version + 1),
            sup_after=largest / (self.version + 1),
        )

    def keep(self) -> None:
        """Gives the version that `advance` wrote its name. It counts once the round is committed."""
        row_files.name(self._next_file, self._error_file(self.version + 1))

    # ---- reading

    def _scratch(self) -> Scratch:
        return Scratch(min(self._piece, BLOCK), self.outputs, self.storage)

    @property
    def _threads(self) -> int:
        """That work on a pass: one at least, which reads while a student is run."""
        return min(THREADS, torch.get_num_threads()) if self._bytes > row_files.LARGE else 0

    @property
    def _piece(self) -> int:
        return max(1, PIECE // self.outputs)

    def _small(self, blocks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows in pieces that stay in the processor's cache."""
        size = min(self._piece, BLOCK)
        for low, rows in blocks:
            for start in range(0, len(rows), size):
                yield low + start, rows[start : start + size]

    def rows(self, index: Tensor | np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """g and S of a batch, both (B, L) float32 on the CPU.

        Args:
            index: sample numbers, shape (B,); one that is on the CPU costs no wait for a device.

        Raises:
            UserError: a number is not in 0 … N-1.
        """
        wanted = index.cpu().numpy() if isinstance(index, Tensor) else index
        g, s = self._taken(wanted, self._g, self._s)
        return g, s

    def targets(self, index: np.ndarray[Any, Any]) -> Tensor:
        """g alone of a batch, (B, L); enough of a ledger that `look` has opened."""
        return self._taken(index, self._g)[0]

    def errors(self, index: np.ndarray[Any, Any]) -> Tensor:
        """S alone of a batch, (B, L)."""
        return self._taken(index, self._s)[0]

    def _taken(self, wanted: np.ndarray[Any, Any], *tables: row_files.Rows) -> list[Tensor]:
        try:
            return [row_files.taken(table, wanted) for table in tables]
        except IndexError:
            bad = int(wanted[(wanted < 0) | (wanted >= self.samples)][0])
            message = f"Expected each sample index to be in 0 … {self.samples - 1}, got {bad}."
            raise UserError(message) from None

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, g, S) of the rows of this process, block by block.

        The memory of a block is used again when the next one is asked for: clone what you keep.
        """
        spare: list[tuple[Tensor, Tensor, row_files.Array]] = []

        def read(block: tuple[int, int]) -> tuple[int, int, tuple[Tensor, Tensor, row_files.Array]]:
            low, high = block
            try:
                memory = spare.pop()
            except IndexError:
                memory = self._memory_of_a_block()
            for out, table in zip(memory[:2], (self._g, self._s), strict=True):
                row_files.read_into(out[: high - low], table, low, memory[2])
            return low, high, memory

        for low, high, memory in ordered_map(read, distributed.my_blocks(self.samples, BLOCK), threads=self._threads):
            yield low, memory[0][: high - low], memory[1][: high - low]
            spare.append(memory)

    def _memory_of_a_block(self) -> tuple[Tensor, Tensor, row_files.Array]:
        """For g and S (BLOCK, L), and for the few rows of either that are read before they are decoded."""
        kind = row_files.row_type(self.storage, self.outputs)
        few = np.empty(max(1, CACHED // kind.itemsize), kind)
        return torch.empty(BLOCK, self.outputs), torch.empty(BLOCK, self.outputs), few

    def log_normaliser(self, eta: float) -> Tensor:
        """log Z of the open version, shape (L,) float64: made once, with S or in one pass over it, then kept.

        Each process runs over its own blocks, and all join those of all in one order: they hold the same bits,
        whatever their number.

        Raises:
            RunError: S holds NaN or infinity.
        """
        if eta not in self._log_z:
            normalisers = block_sums(self.samples, self.outputs) - np.inf
            scratch, work = self._scratch(), Pass(self._g, self._s, eta, self.storage)
            what = f"the ledger ({self._error_file(self.version)})"
            for low, high in distributed.my_blocks(self.samples, BLOCK):
                for start in range(low, high, self._piece):
                    own = work.log_normaliser(start, min(start + self._piece, high), scratch, what)
                    np.logaddexp(normalisers[low // BLOCK], own, out=normalisers[low // BLOCK])
            self._log_z[eta] = joined_normalisers(normalisers)
        return self._log_z[eta]
