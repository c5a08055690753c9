"""Ledgers of files that are not held in memory, and of 16-bit numbers."""

import errno
import os
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bdistil import ErrorLedger, RunError, UserError
from bdistil.boosting.ledger import ledger as ledger_module
from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.large_rows import LargeRows
from bdistil.boosting.ledger.reductions import BLOCK, GROUP, column_sum
from bdistil.functional.boosting import game_rows
from bdistil.functional.distillation import centre

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


def first_round(ledger):
    """What is said of a first student, against which S is 0."""
    other = ErrorLedger(ledger.folder / "first", ledger.storage)
    other.create(N, answers(0), outputs=L)
    other.use(0)
    return asdict(other.advance(answers(1), eta=ETA, tolerance=1e-3))


def again(ledger):
    """The same ledger as a restart sees it."""
    other = ErrorLedger(ledger.folder, ledger.storage)
    other.open(N)
    other.use(2)
    return other


@pytest.fixture
def three_threads():
    """As many share a pass; a thread to come starts with as many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(threads)
    assert found == 3


def all_large(monkeypatch):
    """Has files of any size read by rows, slowly enough for threads to overlap."""
    monkeypatch.setattr(row_files, "LARGE", 0)
    fill = LargeRows.fill
    monkeypatch.setattr(LargeRows, "fill", lambda *values: (fill(*values), time.sleep(0.02)))


@pytest.mark.parametrize("storage", ["float32", "int16"])
@pytest.mark.usefixtures("three_threads")
def test_a_large_file_gives_the_same_bits(tmp_path, monkeypatch, storage):
    small, expected = two_rounds(tmp_path / "small", storage)
    all_large(monkeypatch)
    monkeypatch.setattr(row_files, "compiled", lambda: None)
    if storage == "int16":
        warnings.simplefilter("ignore")  # says that Numba is not there
    large, found = two_rounds(tmp_path / "large", storage)
    assert isinstance(large._s, LargeRows)
    assert not isinstance(small._s, LargeRows)
    assert found == expected
    assert torch.equal(large.log_normaliser(ETA), small.log_normaliser(ETA))
    index = torch.randperm(N)
    for ours, theirs in zip(large.rows(index), small.rows(index), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(large.blocks(), small.blocks(), strict=True):
        assert ours[0] == theirs[0]
        assert all(map(torch.equal, ours[1:], theirs[1:]))
    for name in (f"teacher.{large._kind}", f"error.002.{large._kind}"):
        assert (large.folder / name).read_bytes() == (small.folder / name).read_bytes()


@pytest.mark.usefixtures("three_threads")
def test_what_is_compiled_writes_the_same_files(tmp_path, monkeypatch):
    small, expected = two_rounds(tmp_path / "small", "int16")
    all_large(monkeypatch)
    assert row_files.compiled()
    large, found = two_rounds(tmp_path / "large", "int16")
    for name in ("teacher.i16", "error.002.i16"):
        assert (large.folder / name).read_bytes() == (small.folder / name).read_bytes()
    assert found == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected.items()}
    assert first_round(large) == {name: pytest.approx(value, rel=1e-5) for name, value in first_round(small).items()}
    torch.testing.assert_close(large.log_normaliser(ETA), small.log_normaliser(ETA), rtol=3e-8, atol=0)


def test_without_numba_the_user_is_told_what_it_would_save(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bdistil.boosting.ledger.int16_kernels", None)  # as where its import fails
    monkeypatch.delattr("bdistil.boosting.ledger.int16_kernels", raising=False)
    row_files.compiled.cache_clear()
    try:
        two_rounds(tmp_path / "small", "int16")
        monkeypatch.setattr(row_files, "LARGE", 0)
        with pytest.warns(UserWarning, match=r"pip install 'bdistil\[int16\]'"):
            ledger, _ = two_rounds(tmp_path / "large", "int16")
        assert sum(len(g) for _, g, _ in ledger.blocks()) == N
    finally:
        row_files.compiled.cache_clear()


def test_a_numba_that_does_not_work_is_left_alone(monkeypatch):
    kernels = row_files.compiled()
    row_files.compiled.cache_clear()

    def broken():
        raise TypeError("no such type")

    try:
        monkeypatch.setattr(kernels, "trial", broken)
        with pytest.warns(UserWarning, match=r"Numba does not work here.*no such type"):
            assert row_files.compiled() is None
    finally:
        row_files.compiled.cache_clear()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_compiled_names_the_first_bad_sample(tmp_path, monkeypatch, bad):
    all_large(monkeypatch)
    ledger, _ = two_rounds(tmp_path, "int16")
    logits = answers(3)
    logits[1][1][3, 2] = bad
    with pytest.raises(RunError, match=f"the student's logits, first at sample {BLOCK + 3}"):
        ledger.advance(logits, eta=ETA, tolerance=1e-3)
    path = ledger.folder / "error.002.i16"
    content = bytearray(path.read_bytes())
    content[:4] = np.float32(bad).tobytes()
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"the ledger .* first at sample 0"):
        again(ledger).log_normaliser(ETA)


@pytest.mark.parametrize("eta", [30.0, 300.0])
def test_extreme_numbers_are_added_up_safely(tmp_path, monkeypatch, eta):
    """2^(eta S log2 e) is more than float32 can hold, and what is compiled leaves such rows to what can."""
    small, _ = two_rounds(tmp_path / "small", "int16")
    expected = small.advance(answers(3), eta=eta, tolerance=1e-3)
    all_large(monkeypatch)
    large, _ = two_rounds(tmp_path / "large", "int16")
    kernels, called = row_files.compiled(), []
    monkeypatch.setattr(
        kernels, "advance", lambda *values, of=kernels.advance: called.append(of(*values)) or called[-1]
    )
    found = large.advance(answers(3), eta=eta, tolerance=1e-3)
    assert called
    assert not all(well for well, *_ in called)
    assert asdict(found) == {name: pytest.approx(value, rel=1e-5) for name, value in asdict(expected).items()}
    for ledger in (small, large):
        ledger.keep()
        ledger.use(3)
        assert ledger.log_normaliser(eta).isfinite().all()
    torch.testing.assert_close(large.log_normaliser(eta), small.log_normaliser(eta), rtol=1e-7, atol=0)


def test_compiled_powers_are_those_of_float64():
    kernels, count = row_files.compiled(), 1 << 16
    for high in (1, 59):  # eta S in powers of 2
        row = np.zeros((1, 2 + count), np.int16)
        row[0, :2] = np.array([high / 32767], np.float32).view(np.int16)
        row[0, 2:] = np.arange(count) - (count // 2)
        exponents = row[0, 2:].astype(np.float64) * np.float32(high / 32767)
        found = np.empty(count)
        assert kernels.log_normaliser(row, np.float32(0.999), found)
        scaled = exponents * 0.999 * np.log(2)
        np.testing.assert_allclose(np.exp(found), 2 * np.cosh(scaled), rtol=2e-7 * (1 + high))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("storage", ["float32", "int16"])
@pytest.mark.parametrize("piece", [1, 64, 1 << 16])
def test_the_normaliser_made_with_the_errors_is_that_of_the_file(tmp_path, monkeypatch, storage, piece, large):
    monkeypatch.setattr(ledger_module, "PIECE", piece)
    if large:
        monkeypatch.setattr(row_files, "LARGE", 0)
    ledger, _ = two_rounds(tmp_path, storage)
    made, read = ledger.log_normaliser(ETA), again(ledger).log_normaliser(ETA)
    assert torch.equal(made, read)
    error = ledger.rows(torch.arange(N))[1].double() * ETA
    torch.testing.assert_close(made, torch.logsumexp(torch.cat((error, -error)), 0), rtol=3e-8, atol=0)


def test_sums_are_in_float64_but_for_a_few_rows():
    rows = torch.ones(BLOCK, 3)
    rows[0] = 2.0**30  # beside which float32 has no room for a 1
    assert column_sum(rows).tolist() == [2.0**30 + BLOCK - GROUP] * 3
    assert column_sum(rows[1:]).tolist() == [BLOCK - 1.0] * 3
    kept, _ = row_files.encoded(torch.zeros(BLOCK, 3), "int16")
    total = np.full(3, 2.0**30)
    row_files.compiled().flush(np.ones(3, np.float32), total)
    assert total.tolist() == [2.0**30 + 1] * 3
    assert row_files.compiled().log_normaliser(row_files.flat(kept), np.float32(1), total)
    np.testing.assert_allclose(np.exp(total), 2 * BLOCK, rtol=1e-12)


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


def test_rows_are_read_and_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    small, _ = two_rounds(tmp_path, "int16")
    blocks = [(low, g.clone(), s.clone()) for low, g, s in small.blocks()]
    monkeypatch.setattr(row_files, "LARGE", 0)
    monkeypatch.setattr(ledger_module, "CACHED", 100 * (2 * L + 4))  # 100 rows
    large = again(small)
    for ours, theirs in zip(large.blocks(), blocks, strict=True):
        assert ours[0] == theirs[0]
        assert all(map(torch.equal, ours[1:], theirs[1:]))
    os.truncate(large.folder / "error.002.i16", (N - 1) * (2 * L + 4))
    with pytest.raises(OSError, match=f"error.002.i16 ends before row {N}"):
        deque(large.blocks(), maxlen=0)


def test_compiled_rows_of_a_batch_are_those_of_numpy(tmp_path, monkeypatch):
    small, _ = two_rounds(tmp_path, "int16")
    monkeypatch.setattr(row_files, "LARGE", 0)
    large, order = again(small), np.random.default_rng(0).permutation(N)
    assert row_files.compiled()
    monkeypatch.setattr(LargeRows, "take", None)  # is not what reads them
    for index in (order, order[::3], order.astype(np.int32), np.array([], np.int64), torch.tensor([5, 5])):
        for ours, theirs in zip(large.rows(index), small.rows(index), strict=True):
            assert torch.equal(ours, theirs)
    monkeypatch.undo()
    monkeypatch.setattr(row_files, "LARGE", 0)
    for bad in (-1, N):
        with pytest.raises(UserError, match=f"0 … {N - 1}, got {bad}"):
            large.rows(np.array([0, bad]))
    with pytest.raises(TypeError):
        large.rows(np.array([0.5]))
    os.truncate(large.folder / "teacher.i16", (N - 1) * (2 * L + 4))
    with pytest.raises(OSError, match=f"teacher.i16 ends before row {N}"):
        large.rows(order)


def test_an_error_of_the_disk_is_not_lost_to_the_thread_that_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LARGE", 0)
    monkeypatch.setattr(row_files, "FLUSH_SECONDS", 0.001)
    flushed = threading.Event()

    def flush(rows):
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LargeRows, "flush", flush)
    table = row_files.blank(tmp_path / "rows", (8, 4))
    with pytest.raises(OSError, match="Input/output"), row_files.flushed_meanwhile(table):
        assert flushed.wait(10)


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
