"""The ledger against plain NumPy, its refusals, and two processes against one."""

import json
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import BUSY
from helpers.toys import on_ranks

from bdistil import functional as bf
from bdistil.boosting.ledger.ledger import ErrorLedger
from bdistil.boosting.ledger.records import Units
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.errors import RunError, UserError
from bdistil.utils import distributed

N, L, ETA = 2 * BLOCK + 76, 3, 0.5  # the last block is short
ROUNDS = 3


def teacher_logits(samples=N, outputs=L):
    """Neither centred nor of unit size."""
    return 7.0 * torch.randn(samples, outputs, generator=torch.Generator().manual_seed(1)) + 2.0


def student_logits(number, samples=N, outputs=L):
    """In units of the ledger."""
    return torch.randn(samples, outputs, generator=torch.Generator().manual_seed(10 + number))


def in_blocks(logits):
    """The rows of this process as (first row, logits)."""
    return [(low, logits[low:high]) for low, high in distributed.my_blocks(len(logits), BLOCK)]


def a_ledger(folder, logits=None, teacher="a teacher"):
    logits = teacher_logits() if logits is None else logits
    ledger = ErrorLedger(folder)
    ledger.create(len(logits), in_blocks(logits), outputs=logits.shape[1], teacher=teacher)
    ledger.open(len(logits), teacher)
    ledger.use(0)
    return ledger


def add(ledger, logits, *, eta=ETA, tolerance=1e-3):
    """One round: the evidence of a student that is accepted."""
    evidence = ledger.advance(in_blocks(logits), eta=eta, tolerance=tolerance)
    ledger.publish()
    ledger.use(ledger.version + 1)
    return evidence


def in_numpy(logits):
    """g in units of the ledger, and the unit."""
    centred = logits.double().numpy()
    centred = centred - centred.mean(1, keepdims=True)
    scale = np.sqrt((centred**2).mean())
    return centred / scale, scale


@pytest.fixture
def ledger(tmp_path):
    return a_ledger(tmp_path / "run" / "train")


# ---- g


def test_unit_is_the_rms_of_the_centred_logits(ledger):
    g, scale = in_numpy(teacher_logits())
    assert ledger.units.scale == pytest.approx(scale, rel=1e-6)
    assert ledger.bound == pytest.approx(2 * np.abs(g).max(), rel=1e-6)
    assert (ledger.samples, ledger.outputs) == (N, L)
    ours, error = ledger.rows(torch.arange(N))
    assert ours.dtype == error.dtype == torch.float32
    np.testing.assert_allclose(ours, g, rtol=1e-5, atol=1e-6)
    assert not error.any()


@pytest.mark.parametrize("index", [[5], [3, 0, N - 1, 3], [BLOCK, BLOCK - 1], []], ids=str)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_rows_by_index(ledger, kind, index):
    add(ledger, student_logits(0))
    g, _ = in_numpy(teacher_logits())
    ours, error = ledger.rows(kind(index, dtype=torch.int64 if kind is torch.tensor else np.int64))
    np.testing.assert_allclose(ours, g[index], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(error, (student_logits(0).numpy() - g)[index], rtol=1e-5, atol=1e-5)


def test_rows_are_copies(ledger):
    ledger.rows(torch.tensor([4]))[1].fill_(9.0)
    assert not ledger.rows(torch.tensor([4]))[1].any()


def test_unit_of_another_ledger(tmp_path):
    ledger = ErrorLedger(tmp_path)
    ledger.create(N, in_blocks(teacher_logits()), outputs=L, units=Units(2.0))
    ledger.use(0)
    centred = bf.centre(teacher_logits())
    torch.testing.assert_close(ledger.rows(torch.arange(N))[0], centred / 2)
    assert (ledger.units.scale, ledger.bound) == (2.0, pytest.approx(centred.abs().max().item()))


# ---- S


def evidence_in_numpy(error, deviation, rounds, g, bound, tolerance):
    """What a student is worth, given S before it; after the multiplicative weights of all samples."""
    z = (np.exp(-ETA * error) + np.exp(ETA * error)).sum(0)
    margin = ((np.exp(-ETA * error) - np.exp(ETA * error)) / z * deviation).sum(0)
    before = g if rounds == 0 else error / rounds
    after = (error + deviation) / (rounds + 1)
    return {
        "margin_share": (margin >= -tolerance * bound).mean(),
        "margin_min": margin.min(),
        "rms_before": np.sqrt((before**2).mean()),
        "rms_after": np.sqrt((after**2).mean()),
        "sup_after": np.abs(after).max(),
    }


@pytest.mark.parametrize("tolerance", [1e-3, 0.05])
def test_three_rounds_against_numpy(ledger, tolerance):
    g, _ = in_numpy(teacher_logits())
    error = np.zeros((N, L))
    shares = set()
    for number in range(ROUNDS):
        # Students that go right in output 0, wrong in output 1, and anywhere in output 2.
        answer = student_logits(number).double() + torch.from_numpy(g - error * [0.5, -0.5, 0.0])
        found = asdict(add(ledger, answer, tolerance=tolerance))
        deviation = answer.numpy() - g
        expected = evidence_in_numpy(error, deviation, number, g, 2 * np.abs(g).max(), tolerance)
        assert found == {name: pytest.approx(value, rel=2e-5, abs=2e-6) for name, value in expected.items()}
        shares.add(found["margin_share"])
        error = error + deviation
        np.testing.assert_allclose(ledger.rows(np.arange(N))[1], error, rtol=1e-4, atol=1e-5)
        assert ledger.version == number + 1
    assert len(shares) > 1


def test_a_margin_is_met_from_minus_the_tolerance_on(tmp_path):
    # One sample, one output pair: g = (1, -1), S = d of round 0, so the margin of round 1 is known.
    ledger = a_ledger(tmp_path, torch.tensor([[1.0, -1.0]]))
    add(ledger, torch.tensor([[2.0, -2.0]]))  # S = (1, -1)
    wrong = torch.tensor([[1.1, -1.1]])  # d = (0.1, -0.1): the same way as S
    margin = -np.tanh(ETA) * 0.1
    met = [
        ledger.advance([(0, wrong)], eta=ETA, tolerance=-margin / 2 * factor).margin_share  # b = 2
        for factor in (0.9, 1.1)
    ]
    assert met == [0.0, 1.0]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_game_rows_equal_the_weights_of_the_whole_error(ledger, scale):
    for number in range(2):
        add(ledger, scale * student_logits(number))
    _, error = ledger.rows(torch.arange(N))
    ours = bf.game_rows(error.double(), ledger.log_normaliser(ETA), ETA)
    expected = bf.game_weights(error.double(), ETA)
    # Terms of Z are float32, as S is; only their sum is float64.
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-7 * max(scale, 2), atol=0)
    rows = torch.tensor([N - 1, 0, 17])
    part = bf.game_rows(ledger.rows(rows)[1], ledger.log_normaliser(ETA).float(), ETA)
    torch.testing.assert_close(torch.stack(part), torch.stack(expected)[:, rows].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [200.0, 2000.0, -2000.0])
def test_normaliser_at_huge_errors(ledger, size):
    add(ledger, torch.full((N, L), size / ETA))
    found = ledger.log_normaliser(ETA)
    assert found.dtype == torch.float64
    assert found.shape == (L,)
    # Each of the N samples adds exp(|size| -+ eta g), and nothing that counts beside it.
    g, _ = in_numpy(teacher_logits())
    np.testing.assert_allclose(found, abs(size) + np.log(np.exp(-np.sign(size) * ETA * g).sum(0)), rtol=1e-6)


def test_normaliser_is_of_the_version_and_the_step_size(ledger):
    assert ledger.log_normaliser(ETA).tolist() == pytest.approx([np.log(2 * N)] * L)
    add(ledger, student_logits(0))
    half, whole = ledger.log_normaliser(ETA), ledger.log_normaliser(2 * ETA)
    error = ledger.rows(torch.arange(N))[1].double()
    torch.testing.assert_close(half, bf.log_normaliser(error, ETA))
    torch.testing.assert_close(whole, bf.log_normaliser(error, 2 * ETA))


@pytest.mark.parametrize("samples", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_number_of_samples(tmp_path, samples):
    ledger = a_ledger(tmp_path, teacher_logits(samples))
    add(ledger, student_logits(0, samples))
    g, _ = in_numpy(teacher_logits(samples))
    expected = student_logits(0, samples).numpy() - g
    ours, error = ledger.rows(np.arange(samples))
    np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours, g, rtol=1e-5, atol=1e-6)


# ---- files


def test_a_version_replaces_the_others(ledger):
    assert [ledger.has(version) for version in range(3)] == [True, False, False]
    add(ledger, student_logits(0))
    add(ledger, student_logits(1))
    ledger.advance(in_blocks(student_logits(2)), eta=ETA, tolerance=0.0)
    assert (ledger.folder / "error.next.tmp").exists()
    ledger.use(2)  # the student of round 2 was rejected
    assert sorted(p.name for p in ledger.folder.iterdir()) == ["error.002.f32", "ledger.json", "teacher.f32"]
    assert [ledger.has(version) for version in range(4)] == [True, False, True, False]


def test_a_rejected_student_leaves_no_trace(ledger):
    add(ledger, student_logits(0))
    before = ledger.rows(torch.arange(N))[1]
    ledger.advance(in_blocks(student_logits(5)), eta=ETA, tolerance=0.0)
    assert torch.equal(ledger.rows(torch.arange(N))[1], before)
    add(ledger, student_logits(1))
    g = ledger.rows(torch.arange(N))[0]
    torch.testing.assert_close(ledger.rows(torch.arange(N))[1], before + student_logits(1) - g)


def test_a_restart_goes_on_with_the_same_bits(ledger):
    add(ledger, student_logits(0))
    again = ErrorLedger(ledger.folder)
    again.open(N, "a teacher")
    again.use(1)
    assert again.head == ledger.head
    assert torch.equal(again.log_normaliser(ETA), ledger.log_normaliser(ETA))
    for ours, theirs in zip(again.rows(torch.arange(N)), ledger.rows(torch.arange(N)), strict=True):
        assert torch.equal(ours, theirs)


def test_no_more_than_three_matrices_on_the_disk(ledger):
    for number in range(ROUNDS):
        ledger.advance(in_blocks(student_logits(number)), eta=ETA, tolerance=0.0)
        ledger.publish()
        sizes = {p.name: p.stat().st_size for p in ledger.folder.iterdir()}
        text = sizes.pop("ledger.json")
        assert text < 400
        assert sum(sizes.values()) <= 3 * N * L * 4, sizes
        ledger.use(number + 1)
    assert sum(p.stat().st_size for p in ledger.folder.iterdir()) <= 2 * N * L * 4 + 400


# ---- refusals


@pytest.mark.parametrize("index", [[0, N], [-1, 2], [5, N + 7, -3]], ids=str)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_index_out_of_range(ledger, kind, index):
    bad = next(i for i in index if not 0 <= i < N)
    with pytest.raises(UserError, match=rf"sample index to be in 0 … {N - 1}, got {bad}\."):
        ledger.rows(kind(index))


@pytest.mark.parametrize(("folder", "part"), [("train", "training"), ("val", "validation")])
def test_another_number_of_samples(tmp_path, folder, part):
    ledger = a_ledger(tmp_path / "run" / folder)
    message = rf"The {part} dataset has {N + 1} samples, but the run in .*run was started with {N}\..*run_dir"
    with pytest.raises(UserError, match=message):
        ErrorLedger(ledger.folder).open(N + 1, "a teacher")


def test_another_teacher(ledger):
    with pytest.raises(UserError, match=r"teacher's weights differ .*run was started with.*`run_dir`"):
        ErrorLedger(ledger.folder).open(N, "another teacher")
    ErrorLedger(ledger.folder).open(N)  # a fingerprint that is not known is not compared


@pytest.mark.parametrize("state", ["torn", "missing"])
def test_the_teachers_file_is_not_whole(ledger, state):
    path = ledger.folder / "teacher.f32"
    path.unlink() if state == "missing" else path.write_bytes(path.read_bytes()[:-4])
    size = 0 if state == "missing" else N * L * 4 - 4
    with pytest.raises(RunError, match=rf"teacher\.f32 is missing or torn: {size} bytes, {N * L * 4} expected"):
        ErrorLedger(ledger.folder).open(N, "a teacher")


def test_a_torn_head_is_named(ledger):
    (ledger.folder / "ledger.json").write_text('{"samples": ')
    with pytest.raises(RunError, match=r"ledger\.json is .*torn"):
        ErrorLedger(ledger.folder).open(N, "a teacher")


def test_a_torn_error_is_not_used(ledger):
    add(ledger, student_logits(0))
    path = ledger.folder / "error.001.f32"
    path.write_bytes(path.read_bytes()[:100])
    again = ErrorLedger(ledger.folder)
    again.open(N, "a teacher")
    assert not again.has(1)
    with pytest.raises(RunError, match=r"error\.001\.f32 is missing or torn"):
        again.use(1)
    assert path.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sample", [0, BLOCK + 3])
def test_teacher_without_a_number(tmp_path, sample, value):
    logits = teacher_logits()
    logits[[sample, N - 1], 1] = value
    with pytest.raises(RunError, match=rf"NaN or infinity in the teacher's logits, first at sample {sample}\. Nothing"):
        a_ledger(tmp_path, logits)
    assert not ErrorLedger(tmp_path).exists


@pytest.mark.parametrize("sample", [0, BLOCK + 3])
def test_student_without_a_number(ledger, sample):
    add(ledger, student_logits(0))
    before = ledger.rows(torch.arange(N))[1]
    logits = student_logits(1)
    logits[[sample, N - 1], 2] = torch.nan
    message = rf"the student's logits, first at sample {sample}\. Nothing of this round was committed"
    with pytest.raises(RunError, match=message):
        ledger.advance(in_blocks(logits), eta=ETA, tolerance=0.0)
    assert ledger.version == 1
    assert not ledger.has(2)
    assert torch.equal(ledger.rows(torch.arange(N))[1], before)


@pytest.mark.parametrize("sample", [0, BLOCK + 3, N - 1])
def test_error_without_a_number(ledger, sample):
    add(ledger, student_logits(0))
    table = np.memmap(ledger.folder / "error.001.f32", np.float32, "r+", shape=(N, L))
    table[sample:, 0] = np.nan
    table.flush()
    message = rf"the ledger \(.*error\.001\.f32\), first at sample {sample}\. Nothing of this round was committed"
    again = ErrorLedger(ledger.folder)
    again.open(N)
    again.use(1)
    with pytest.raises(RunError, match=message):
        again.log_normaliser(ETA)


# ---- two processes

BLOCKS = [2, 3, 5]


def play(folder, blocks):
    """Three rounds by all processes together: everything that must not depend on their number."""
    samples = (blocks - 1) * BLOCK + 76
    ledger = a_ledger(folder, teacher_logits(samples))
    evidence = [asdict(add(ledger, student_logits(number, samples))) for number in range(ROUNDS)]
    return {
        "scale": ledger.units.scale,
        "bound": ledger.bound,
        "error": (folder / f"error.{ROUNDS:03d}.f32").read_bytes().hex(),
        "log_z": ledger.log_normaliser(ETA).tolist(),
        "evidence": evidence,
    }


def as_rank(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=BUSY))
    try:
        found = {blocks: play(folder / f"two{blocks}", blocks) for blocks in BLOCKS}
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    assert on_ranks(folder, as_rank, folder) == [0, 0], (folder / "rank0.log").read_text()[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["error", "log_z", "bound", "scale", "evidence"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_two_processes_give_the_bits_of_one(of_two, tmp_path, blocks, what):
    alone = play(tmp_path, blocks)[what]
    for found in of_two:
        assert found[str(blocks)][what] == alone
