"""Ledgers of files that are not held in memory, and of 16-bit numbers."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bdistil import ErrorLedger, RunError, row_files
from bdistil import ledger as ledger_module
from bdistil.block_sums import BLOCK
from bdistil.functional import centre, game_rows
from bdistil.row_files import LargeRows

N, L, ETA = 2 * BLOCK + 7, 5, 0.5


def answers(seed, noise=0.3):
    """Of a teacher, and of students near to it, so that S stays within 4."""
    teacher, own = (torch.randn(N, L, generator=torch.Generator().manual_seed(key)) for key in (0, seed))
    table = centre(teacher) + noise * own if seed else teacher
    return [(low, table[low : low + BLOCK]) for low in range(0, N, BLOCK)]


def two_rounds(folder, storage="float32"):
    """A ledger after two rounds, and what was said of the second student."""
    ledger = ErrorLedger(folder, storage)
    ledger.create(N, answers(0), outputs=L)
    for number in range(2):
        ledger.use(number)
        evidence = ledger.advance(answers(number + 1), eta=ETA, tolerance=1e-3)
        ledger.keep()
    ledger.use(2)
    return ledger, asdict(evidence)


def again(ledger):
    """The same ledger as a restart sees it."""
    other = ErrorLedger(ledger.folder, ledger.storage)
    other.open(N)
    other.use(2)
    return other


@pytest.mark.parametrize("storage", ["float32", "int16"])
def test_a_large_file_gives_the_same_bits(tmp_path, monkeypatch, storage):
    small, expected = two_rounds(tmp_path / "small", storage)
    monkeypatch.setattr(row_files, "LARGE", 0)
    fill = LargeRows.fill
    monkeypatch.setattr(LargeRows, "fill", lambda *values: (fill(*values), time.sleep(0.02)))  # the threads overlap
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # as many share a pass
    try:
        large, found = two_rounds(tmp_path / "large", storage)
        with ThreadPoolExecutor(1) as pool:  # a thread to come
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)
    assert isinstance(large._s, LargeRows)
    assert not isinstance(small._s, LargeRows)
    assert found == expected
    assert torch.equal(large.log_normaliser(ETA), small.log_normaliser(ETA))
    index = torch.randperm(N)
    for ours, theirs in zip(large.rows(index), small.rows(index), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    for name in (f"teacher.{large._kind}", f"error.002.{large._kind}"):
        assert (large.folder / name).read_bytes() == (small.folder / name).read_bytes()


@pytest.mark.parametrize("storage", ["float32", "int16"])
@pytest.mark.parametrize("piece", [1, 64, 1 << 16])
def test_the_normaliser_made_with_the_errors_is_that_of_the_file(tmp_path, monkeypatch, storage, piece):
    monkeypatch.setattr(ledger_module, "PIECE", piece)
    ledger, _ = two_rounds(tmp_path, storage)
    made, read = ledger.log_normaliser(ETA), again(ledger).log_normaliser(ETA)
    assert torch.equal(made, read)
    error = ledger.rows(torch.arange(N))[1].double() * ETA
    torch.testing.assert_close(made, torch.logsumexp(torch.cat((error, -error)), 0), rtol=1e-7, atol=0)


def test_weights_from_half_the_room(tmp_path):
    (_, evidence), (half, rounded) = two_rounds(tmp_path / "full"), two_rounds(tmp_path / "half", "int16")
    sizes = {p.stem: p.stat().st_size for p in half.folder.glob("*.i16")}
    assert sizes == dict.fromkeys(("teacher", "error.002"), N * (2 * L + 4))
    assert rounded == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in evidence.items()}


def test_weights_of_half_the_room_stay_true_over_rounds(tmp_path):
    """Each round adds the error of g and a new one; |S| stays within 5 here, as it does in a game that works."""
    ledgers = [ErrorLedger(tmp_path / storage, storage) for storage in ("float32", "int16")]
    for ledger in ledgers:
        ledger.create(N, answers(0), outputs=L)
    for number in range(10):
        weights = []
        for ledger in ledgers:
            ledger.use(number)
            ledger.advance(answers(number + 1, noise=0.2), eta=ETA, tolerance=1e-3)
            ledger.keep()
            ledger.use(number + 1)
            error = ledger.rows(torch.arange(N))[1]
            weights.append(torch.stack(game_rows(error, ledger.log_normaliser(ETA).float(), ETA)))
        off = (weights[1] / weights[0] - 1).abs().max()
        assert 0 < off < 5e-5 * (number + 1)
    assert 1 < error.abs().max() < 5


def test_sixteen_bits_are_within_half_a_step_of_a_row():
    rows = torch.cat((torch.randn(50, 7) * torch.logspace(-6, 6, 50)[:, None], torch.zeros(1, 7)))
    kept, found = row_files.encoded(rows, "int16")
    assert torch.equal(row_files.decoded(kept), found)
    allowed = rows.abs().amax(1, keepdim=True) * (0.501 / 32767)
    assert ((found - rows).abs() <= allowed).all()
    assert torch.equal(found[-1], torch.zeros(7))


def test_a_ledger_of_the_other_storage_is_not_taken(tmp_path):
    two_rounds(tmp_path, "int16")
    with pytest.raises(RunError, match=r"teacher\.f32 is missing or torn"):
        ErrorLedger(tmp_path, "float32").open(N)


def resident():
    """Bytes of mapped files that this process is charged for."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssFile"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's own count")
def test_a_process_does_not_hold_the_rows_it_has_read(tmp_path, monkeypatch):
    size = 64 << 20
    np.arange(size // 4, dtype=np.float32).tofile(tmp_path / "rows")
    rows, before, order = size >> 12, resident(), np.random.default_rng(0).permutation(size >> 12)

    def read_all(limit):
        monkeypatch.setattr(row_files, "LARGE", limit)
        table = row_files.mapped(tmp_path / "rows", (rows, 1 << 10))
        peak = 0
        for batch in np.split(order, 64):
            assert table.take(batch, 0)[:, 0].tolist() == (batch * float(1 << 10)).tolist()
            peak = max(peak, resident() - before)
        return peak

    assert read_all(limit=size // 8) < size // 2
    assert read_all(limit=size) > size // 2  # a plain map is charged for all of it


def test_a_file_that_ends_early_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LARGE", 0)
    table = row_files.blank(tmp_path / "rows", (8, 4))
    table[2:8] = np.ones((6, 4), np.float32)
    assert table[1:3].tolist() == [[0] * 4, [1] * 4]
    (tmp_path / "rows").write_bytes(b"\0" * 50)
    with pytest.raises(OSError, match="ends before row 8"):
        table[0:8]
    with pytest.raises(OSError, match="ends before row 6"):
        table.take(np.array([1, 5]), 0)
    for bad in (-1, 8):
        with pytest.raises(IndexError):
            table.take(np.array([0, bad]), 0)
    assert table.take(np.array([], np.int64), 0).shape == (0, 4)
