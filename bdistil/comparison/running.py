"""Runs the cells of a comparison, each in its own process, and resumes where an earlier start ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

from bdistil.boosting.parts import copy_teacher
from bdistil.comparison.methods import Cell
from bdistil.errors import RunError
from bdistil.reporting.tables import format_duration
from bdistil.storage.files import disk_errors
from bdistil.storage.run_directory import RunDirectory

LAST_LINES = 3  # number of log lines in the message about a failed cell
PATIENCE = 60.0  # seconds for a process to save what it has after a signal


def is_done(folder: Path) -> bool:
    """Whether the results of a cell have been written."""
    return (folder / "figures.json").exists()


class CellRunner:
    """Runs chains of cells: the cells of a chain in sequence, several chains in parallel.

    Args:
        output: folder of the comparison.
        options: options of `bdistil fit` for every cell.
        workers: number of chains in parallel; torch's threads are divided among them.
        cells: all cells of the comparison, to report the progress.
    """

    def __init__(self, output: Path, options: Sequence[str], workers: int, cells: Sequence[Cell]) -> None:
        self.output, self.options, self.workers = output, list(options), workers
        self._lock, self._processes, self._stopped = Lock(), set[subprocess.Popen[bytes]](), False
        self._open = [cell for cell in cells if not is_done(cell.folder(output))]
        self._count, self._started, self._trained = len(cells), time.perf_counter(), 0

    def run(self, chains: Sequence[Sequence[Cell]]) -> None:
        """Runs all cells that are not done yet.

        Raises:
            RunError: a cell failed; the rest of its chain was skipped, other chains are complete.
        """
        pool = ThreadPoolExecutor(self.workers)
        try:
            runs = [pool.submit(self._run_chain, chain) for chain in chains]
            errors = [error for run in runs if (error := run.exception()) is not None]
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)
        if errors:
            raise errors[0]

    def _stop(self) -> None:
        """Terminates the running processes, giving them time to save their state."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()
        for process in list(self._processes):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()

    def _run_chain(self, chain: Sequence[Cell]) -> None:
        for cell in chain:
            if not is_done(cell.folder(self.output)):
                self._share_teacher(cell, chain)
                self._run_cell(cell)

    def _share_teacher(self, cell: Cell, chain: Sequence[Cell]) -> None:
        """Reuses the teacher's answers of a finished cell with the same seed."""
        for other in chain:
            if other.seed == cell.seed and other.kind != "teacher" and is_done(other.folder(self.output)):
                copy_teacher(*(RunDirectory(each.folder(self.output)) for each in (other, cell)))
                return

    def _run_cell(self, cell: Cell) -> None:
        folder = cell.folder(self.output)
        command = [sys.executable, "-m", "bdistil.cli.cells", cell.kind, *self.options, *cell.options(self.output)]
        threads = str(max(1, torch.get_num_threads() // self.workers))
        with disk_errors(f"the start of {cell.name}", folder):
            folder.mkdir(parents=True, exist_ok=True)
            log = open(folder / "log.txt", "ab")  # noqa: SIM115 (closed below)
        with log:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads}
                )
                self._processes.add(process)
            status = process.wait()
        with self._lock:
            self._processes.remove(process)
            if status and not self._stopped:
                raise RunError(_failure(cell, folder, status))
            if not status:
                self._report(cell)

    def _report(self, cell: Cell) -> None:
        self._open.remove(cell)
        self._trained += cell.kind != "teacher"  # whose time says nothing of the students'
        done, rest = self._count - len(self._open), "time left unknown" if self._open else "all done"
        if self._trained and self._open:
            each = (time.perf_counter() - self._started) / self._trained
            rest = f"about {format_duration(each * len(self._open))} left"
        print(f"{done} of {self._count}: {cell.name}, seed {cell.seed}; {rest}.", flush=True)


def _failure(cell: Cell, folder: Path, status: int) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = "\n  ".join(lines[-LAST_LINES:])
    end = "failed" if status >= 0 else f"was ended by signal {-status} ({signal.strsignal(-status)}; is memory short?)"
    return (
        f"{cell.name}, seed {cell.seed}, {end}; its log is {folder / 'log.txt'}. Give the same command again to go on "
        f"when the cause is mended.\n  {last}"
    )
