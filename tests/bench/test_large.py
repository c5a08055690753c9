"""A ledger of ImageNet's size: a commit and reading rows beside cp and cat of the same bytes, and the memory it takes.

Synthetic logits, N = 1,281,167 by L = 1,000: needs some 21 GB of disk, and minutes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bdistil import ErrorLedger
from bdistil.block_sums import BLOCK
from bdistil.functional import game_rows

pytestmark = pytest.mark.slow

SAMPLES, OUTPUTS, ETA, BATCH = 1_281_167, 1000, 0.5, 256
ALLOWED = 1.5


def logits(seed: int, noise: float = 0.3):
    """(first row, logits) block by block: a teacher (seed 0), or a student near to it. A few rows again and again."""
    teacher, own = (torch.randn(4 * BLOCK, OUTPUTS, generator=torch.Generator().manual_seed(s)) for s in (0, seed))
    table = teacher + noise * own if seed else teacher
    for low in range(0, SAMPLES, BLOCK):
        start = low // BLOCK % 3 * BLOCK
        yield low, table[start : start + min(BLOCK, SAMPLES - low)]


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_process_of_its_own(folder: Path, storage: str) -> None:
    """What a run does with the ledger in a round; prints the seconds, and the largest resident memory."""
    ledger = ErrorLedger(folder, storage)
    ledger.create(SAMPLES, logits(0), outputs=OUTPUTS)
    for number in range(2):  # of the first S is 0, which no disk has to read: the second counts

        def commit(seed=number + 1):
            ledger.advance(logits(seed), eta=ETA, tolerance=1e-3)
            ledger.keep()

        ledger.use(number)
        ledger.log_normaliser(ETA)
        seconds = [timed(commit)]
    ledger.use(2)
    order = np.random.default_rng(0).permutation(SAMPLES)

    def in_order():
        for _ in ledger.blocks():
            pass

    def scattered():
        for low in range(0, SAMPLES, BATCH):
            ledger.rows(order[low : low + BATCH])

    def scattered_by_hand():
        width = ledger._bytes // SAMPLES
        files = [os.open(path, os.O_RDONLY) for path in (ledger._teacher_file, ledger._error_file(2))]
        for low in range(0, SAMPLES, BATCH):
            for file in files:
                b"".join([os.pread(file, width, row * width) for row in order[low : low + BATCH].tolist()])

    seconds += [timed(in_order), timed(scattered), timed(scattered_by_hand)]
    some = np.arange(0, SAMPLES, 641)
    weights = torch.stack(game_rows(ledger.rows(some)[1], ledger.log_normaliser(ETA).float(), ETA))
    np.save(folder / "weights.npy", weights.numpy())
    print(*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def by_hand(folder: Path, kind: str) -> tuple[float, float]:
    """Seconds of the same bytes by cat and cp: what a commit reads and writes, what reading all rows reads."""
    g, s, copy = (str(folder / f"{name}.{kind}") for name in ("teacher", "error.002", "copy"))

    def read(*files: str) -> None:
        subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)

    def write() -> None:
        read(g)
        subprocess.run(["cp", s, copy], check=True)
        subprocess.run(["sync", copy], check=True)

    return timed(write), timed(lambda: read(g, s))


@pytest.mark.parametrize("storage", ["float32", "int16"])
def test_a_ledger_of_the_size_of_imagenet(tmp_path_factory, storage):
    root = tmp_path_factory.getbasetemp() / "large"
    folder, kind = root / storage, {"float32": "f32", "int16": "i16"}[storage]
    folder.mkdir(parents=True)
    program = f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path; import test_large as t; "
    program += f"t.in_process_of_its_own(Path({str(folder)!r}), {storage!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commit, blocks, scattered, preads, resident = map(float, done.stdout.split())
    copied, read = by_hand(folder, kind)
    print(
        f"\n{storage}: commit {commit:.1f} s, {commit / copied:.2f} of cat and cp; rows in order {blocks:.1f} s, "
        f"{blocks / read:.2f} of cat; in random batches {scattered:.1f} s, {scattered / preads:.2f} of one "
        f"read a row, {scattered / read:.2f} of cat; "
        f"resident {resident / 2**20:.2f} GiB"
    )
    for file in folder.glob(f"*.{kind}"):
        file.unlink()
    assert resident / 2**20 < 2
    if storage == "int16":
        full, half = (np.load(root / name / "weights.npy") for name in ("float32", "int16"))
        off = np.abs(half / full - 1)
        print(f"K of int16 after two rounds off by {off.max():.2e} at most")
        assert off.max() < 1e-3
    assert commit <= ALLOWED * copied
    assert blocks <= ALLOWED * read
    assert scattered <= ALLOWED * preads
