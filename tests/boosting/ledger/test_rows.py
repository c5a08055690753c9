"""Ledgers of files that are not held in memory, and of float16 numbers."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bdistil import ErrorLedger, RunError, UserError
from bdistil.boosting.ledger import passes
from bdistil.boosting.ledger import rows as row_files
from bdistil.boosting.ledger.records import Units
from bdistil.boosting.ledger.reductions import BLOCK, GROUP, column_sum
from bdistil.boosting.ledger.rows import RowFile, allocate
from bdistil.functional.boosting import game_rows
from bdistil.functional.distillation import centre

N, L, ETA = 2 * BLOCK + 7, 5, 0.5
STORAGES = ["float32", "float16"]


def answers(seed, noise=0.3):
    """Of a teacher, and of students near to it, so that S stays within 4."""
    teacher, own = (torch.randn(N, L, generator=torch.Generator().manual_seed(key)) for key in (0, seed))
    table = centre(teacher) + noise * own if seed else teacher
    return [(low, table[low : low + BLOCK]) for low in range(0, N, BLOCK)]


def a_ledger(folder, storage="float32"):
    ledger = ErrorLedger(folder, storage)
    ledger.create(N, answers(0), outputs=L)
    ledger.use(0)
    return ledger


def add(ledger, logits):
    """The evidence on a student that is accepted."""
    evidence = ledger.advance(logits, eta=ETA, tolerance=1e-3)
    ledger.publish()
    ledger.use(ledger.version + 1)
    return evidence


def two_rounds(folder, storage="float32"):
    """A ledger after two rounds, and the evidence on both students."""
    ledger = a_ledger(folder, storage)
    return ledger, [asdict(add(ledger, answers(number + 1))) for number in range(2)]


def again(ledger):
    """The same ledger after a restart."""
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
    """No file is held in memory."""
    monkeypatch.setattr(row_files, "LARGE", 0)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("three_threads")
def test_a_large_file_gives_the_same_bits(tmp_path, monkeypatch, storage):
    small, expected = two_rounds(tmp_path / "small", storage)
    all_large(monkeypatch)
    read = RowFile.read
    monkeypatch.setattr(RowFile, "read", lambda *values: (time.sleep(0.02), read(*values))[1])  # threads overlap
    large, found = two_rounds(tmp_path / "large", storage)
    assert (large._s.in_memory, small._s.in_memory) == (False, True)
    assert found == expected
    assert torch.equal(large.log_normaliser(ETA), small.log_normaliser(ETA))
    index = torch.randperm(N)
    for ours, theirs in zip(large.rows(index), small.rows(index), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    for name in (large._teacher_file.name, large._error_file(2).name):
        assert (large.folder / name).read_bytes() == (small.folder / name).read_bytes()


@pytest.mark.parametrize("eta", [30.0, 300.0])
def test_extreme_numbers_are_added_up_safely(tmp_path, monkeypatch, eta):
    """2^(eta S log2 e) is more than float32 can hold."""
    small, _ = two_rounds(tmp_path / "small")
    all_large(monkeypatch)
    large, _ = two_rounds(tmp_path / "large")
    found = []
    for ledger in (small, large):
        found.append(ledger.advance(answers(3), eta=eta, tolerance=1e-3))
        ledger.publish()
        ledger.use(3)
    assert found[0] == found[1]
    assert np.isfinite(list(asdict(found[0]).values())).all()
    error = small.rows(torch.arange(N))[1].double() * eta
    expected = torch.logsumexp(torch.cat((error, -error)), 0)
    for ledger in (small, large):
        torch.testing.assert_close(ledger.log_normaliser(eta), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("piece", [1, 64, 1 << 16])
def test_the_normaliser_made_with_the_errors_is_that_of_the_file(tmp_path, monkeypatch, storage, piece, large):
    monkeypatch.setattr(passes, "PIECE", piece)
    if large:
        all_large(monkeypatch)
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


# ---- float16


def test_half_the_size_on_disk(tmp_path):
    (_, evidence), (half, rounded) = two_rounds(tmp_path / "full"), two_rounds(tmp_path / "half", "float16")
    sizes = {p.name: p.stat().st_size for p in half.folder.iterdir() if p.name != "ledger.json"}
    assert sizes == dict.fromkeys(("teacher.f16", "error.002.f16"), N * L * 2)
    for ours, full in zip(rounded, evidence, strict=True):
        assert ours == {name: pytest.approx(value, rel=2e-3, abs=1e-3) for name, value in full.items()}


def test_weights_from_float16_stay_close_over_rounds(tmp_path):
    """Each round adds the error of g and a new one; |S| stays within 5 here, as it does in a game that works."""
    ledgers = [a_ledger(tmp_path / storage, storage) for storage in STORAGES]
    for number in range(4):
        weights = []
        for ledger in ledgers:
            add(ledger, answers(number + 1, noise=0.2))
            error = ledger.rows(torch.arange(N))[1]
            weights.append(torch.stack(game_rows(error, ledger.log_normaliser(ETA).float(), ETA)))
        assert 0 < (weights[1] / weights[0] - 1).abs().max() < 5e-3
    assert 1 < error.abs().max() < 5


@pytest.mark.parametrize("large", [False, True])
def test_float16_rounds_as_torch_does_and_refuses_what_it_cannot_hold(tmp_path, monkeypatch, large):
    if large:
        all_large(monkeypatch)
    table, rows = allocate(tmp_path / "rows", (4, 3), "float16"), torch.randn(2, 3) * torch.tensor([1e-6, 1.0, 1e4])
    rows[0, 0] = -65504.0
    assert torch.equal(table.write(1, rows), rows.half().float())
    assert torch.equal(table.read(1, 3), rows.half().float())
    rows[1, 2] = -65504.1  # which would be rounded to the last number; from 65520 on, to infinity
    with pytest.raises(RunError, match=r"up to 65504 in .*rows, .*float16, got 6\.55e\+04 at sample 2\. .*'float32'"):
        table.write(1, rows)
    assert torch.equal(table.read(2, 3), table.read(0, 4)[2:3])
    assert table.read(0, 4).isfinite().all()


def test_a_teacher_or_a_student_beyond_float16_is_refused(tmp_path):
    ledger = ErrorLedger(tmp_path / "teacher", "float16")
    with pytest.raises(RunError, match=r"float16, got .* at sample \d+\."):
        ledger.create(N, [(low, 1e5 * rows) for low, rows in answers(0)], outputs=L, units=Units(1.0))
    assert not ledger.exists
    ledger = a_ledger(tmp_path / "student", "float16")
    logits = answers(1)
    logits[1][1][3, 2] = 1e5
    with pytest.raises(RunError, match=rf"got 1e\+05 at sample {BLOCK + 3}\."):
        ledger.advance(logits, eta=ETA, tolerance=1e-3)
    assert not ledger.has(1)


def test_a_ledger_of_the_other_storage_is_not_opened(tmp_path):
    two_rounds(tmp_path, "float16")
    with pytest.raises(RunError, match=r"teacher\.f32 is missing or torn"):
        ErrorLedger(tmp_path, "float32").open(N)


# ---- files


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
        table = RowFile(tmp_path / "rows", (rows, 1 << 10))
        peak = 0
        for batch in np.split(order, 64):
            assert table.gather(batch)[:, 0].tolist() == (batch * float(1 << 10)).tolist()
            peak = max(peak, resident() - before)
        return peak

    assert read_all(limit=size // 8) < size // 2
    assert read_all(limit=size) > size // 2  # a plain map is charged for all of it


@pytest.mark.parametrize("large", [False, True])
def test_rows_are_written_and_read_in_any_order(tmp_path, monkeypatch, large):
    if large:
        all_large(monkeypatch)
    table, rows = allocate(tmp_path / "rows", (8, 4)), torch.randn(6, 4)
    table.write(2, torch.cat((rows, rows), 1)[:, :4])
    assert torch.equal(table.read(1, 4), torch.cat((torch.zeros(1, 4), rows[:2])))
    for place, row in ((7, rows[:1]), (0, rows[1:2].double())):
        table.write(place, row)
    for index in (np.array([0, 7, 3, 3]), np.array([0, 7, 3, 3], np.int32)):
        assert torch.equal(table.gather(index), rows[[1, 0, 1, 1]])
    assert table.gather(np.array([], np.int64)).shape == (0, 4)
    for bad in (-1, 8):
        with pytest.raises(UserError, match=rf"in 0 … 7, got {bad}"):
            table.gather(np.array([0, bad]))
    with pytest.raises(TypeError):
        table.gather(np.array([0.5]))


def test_rows_beyond_two_gigabytes_are_found_by_small_integers(tmp_path):
    path, shape = tmp_path / "rows", (3 << 10, 1 << 18)  # 1 MiB a row
    with open(path, "wb") as file:
        file.truncate(row_files.size_of(shape))  # without blocks on the disk
    row = torch.randn(1, shape[1])
    RowFile(path, shape, writable=True).write(shape[0] - 1, row)
    assert torch.equal(RowFile(path, shape).gather(np.array([shape[0] - 1], np.int32)), row)
    assert path.stat().st_blocks * 512 < 16 << 20


def test_a_file_that_ends_early_is_named(tmp_path, monkeypatch):
    all_large(monkeypatch)
    table = allocate(tmp_path / "rows", (8, 4))
    (tmp_path / "rows").write_bytes(b"\0" * 50)
    for read in (lambda: table.read(0, 8), lambda: table.gather(np.array([1, 5]))):
        with pytest.raises(OSError, match=r"rows ends before row 8"):
            read()


def test_a_number_of_a_sample_that_is_not_there(tmp_path, monkeypatch):
    all_large(monkeypatch)
    ledger, _ = two_rounds(tmp_path)
    for bad in (-1, N):
        with pytest.raises(UserError, match=f"0 … {N - 1}, got {bad}"):
            ledger.rows(np.array([0, bad]))
