"""A ledger of ImageNet's size: a commit beside cp and cat of the same bytes, random batches, and the memory it takes.

Synthetic logits, N = 1,281,167 by L = 1,000: needs some 21 GB of disk, and minutes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bdistil import ErrorLedger
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.functional.boosting import game_rows
from bdistil.utils.memory import keep_freed_memory

pytestmark = pytest.mark.slow

SAMPLES, OUTPUTS, ETA, BATCH = 1_281_167, 1000, 0.5, 256
ALLOWED, TURNS = 1.5, 3


def logits(seed: int, noise: float = 0.3):
    """(first row, logits) block by block: a teacher (seed 0), or a student near to it. A few rows again and again."""
    teacher, own = (torch.randn(4 * BLOCK, OUTPUTS, generator=torch.Generator().manual_seed(s)) for s in (0, seed))
    table = teacher + noise * own if seed else teacher
    for low in range(0, SAMPLES, BLOCK):
        start = low // BLOCK % 3 * BLOCK
        yield low, table[start : start + min(BLOCK, SAMPLES - low)]


def timed(*works) -> float:
    started = time.perf_counter()
    for work in works:
        work()
    return time.perf_counter() - started


def command(*words: str) -> None:
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)


def commits(ledger: ErrorLedger) -> tuple[float, float]:
    """Seconds of a commit, and of cat and cp of the bytes it reads and writes: smallest of some, in turns."""
    ours, theirs, copy = [], [], str(ledger.folder / "copy")
    for number in range(1 + TURNS):
        ledger.use(number)
        ledger.log_normaliser(ETA)
        g, s = str(ledger._teacher_file), str(ledger._error_file(number))
        by_hand = (("cat", g), ("cp", s, copy), ("sync", copy))
        ours.append(
            timed(lambda seed=number + 1: ledger.advance(logits(seed), eta=ETA, tolerance=1e-3), ledger.publish)
        )
        theirs.append(timed(*(partial(command, *words) for words in by_hand)))
        os.unlink(copy)
    return min(ours[1:]), min(theirs[1:])  # the first S is 0, which no disk has to read


def reads_of_batches(ledger: ErrorLedger) -> tuple[float, float]:
    """Seconds of reading all rows in random batches, and of one read a row."""
    order = np.split(np.random.default_rng(0).permutation(SAMPLES), range(BATCH, SAMPLES, BATCH))
    files = [os.open(path, os.O_RDONLY) for path in (ledger._teacher_file, ledger._error_file(ledger.version))]
    width = ledger._teacher_file.stat().st_size // SAMPLES

    def by_hand() -> None:
        for batch in order:
            for file in files:
                b"".join([os.pread(file, width, row * width) for row in batch.tolist()])

    by_hand()  # the first pass reads what the system does not hold in memory
    return timed(lambda: deque(map(ledger.rows, order), maxlen=0)), timed(by_hand)


def in_process_of_its_own(folder: Path, storage: str) -> None:
    """What a run does with the ledger in a round; prints the seconds, and the largest resident memory."""
    keep_freed_memory()  # as the command line does
    ledger = ErrorLedger(folder, storage)
    ledger.create(SAMPLES, logits(0), outputs=OUTPUTS)
    seconds = commits(ledger)
    ledger.use(1 + TURNS)
    seconds += reads_of_batches(ledger)
    some = np.arange(0, SAMPLES, 641)
    weights = torch.stack(game_rows(ledger.rows(some)[1], ledger.log_normaliser(ETA).float(), ETA))
    np.save(folder / "weights.npy", weights.numpy())
    print(*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_ledger_of_the_size_of_imagenet(tmp_path_factory, record, storage):
    root = tmp_path_factory.getbasetemp() / "large"
    folder = root / storage
    folder.mkdir(parents=True)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, __file__, str(folder), storage]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    commit, copied, scattered, preads, resident = map(float, done.stdout.split())
    print(
        f"\n{storage}: commit {commit:.1f} s, {commit / copied:.2f} of cat and cp; rows in random batches "
        f"{scattered:.1f} s, {scattered / preads:.2f} of one read a row; resident {resident / 2**20:.2f} GiB"
    )
    for file in folder.glob("*.f??"):  # room for the other
        file.unlink()
    record(f"commit of a large ledger / cat and cp, {storage}", commit / copied)
    record(f"rows of a large ledger in random batches / one read a row, {storage}", scattered / preads)
    assert resident / 2**20 < 2
    if storage == "float16":
        full, half = (np.load(root / name / "weights.npy") for name in ("float32", "float16"))
        off = np.abs(half / full - 1)
        print(f"K of float16 after {1 + TURNS} rounds off by {off.max():.2e} at most")
        assert off.max() < 5e-3
    assert commit <= ALLOWED * copied
    assert scattered <= ALLOWED * preads


if __name__ == "__main__":
    in_process_of_its_own(Path(sys.argv[1]), sys.argv[2])
