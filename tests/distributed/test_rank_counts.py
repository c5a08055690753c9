"""One run on one process, on two, and on a number that changes: the same weights, the same ensemble, no hang."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.job import BOUND, EPOCHS, ROUNDS, SETTINGS, TRAIN, finish, finished, run, start
from helpers.toys import curve, digests, in_child, ledger, samples

from bdistil import ProgressiveEnsemble
from bdistil.functional.boosting import game_weights

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("two") / "run", 2)


def game(folder):
    return torch.stack(game_weights(ledger(folder, version=ROUNDS, count=TRAIN)[1].double(), SETTINGS.eta))


def differences(one, other):
    """Largest relative difference of the game's weights, and largest difference of logits in units of their rms."""
    weights = (game(one) / game(other) - 1).abs().max()
    first, second = (ProgressiveEnsemble.load(folder)(samples(256, 13)[0]) for folder in (one, other))
    return float(weights), float((first - second).abs().max() / first.square().mean().sqrt())


def check_same(one, other):
    weights, logits = differences(one, other)
    print(f"weights of the game {weights:.1e} relative, logits {logits:.1e} of their rms")
    assert weights < 1e-5
    assert logits < 1e-5
    for row, same in zip(curve(one), curve(other), strict=True):
        assert [row[k] for k in ("macs", "train_macs", "accepted_class")] == [
            same[k] for k in ("macs", "train_macs", "accepted_class")
        ]
        assert float(row["val_accuracy"]) == pytest.approx(float(same["val_accuracy"]), abs=2 / 600)


def test_two_processes_train_what_one_trains(one, two):
    check_same(one, two)
    assert digests(one) != digests(two), "no two numbers of processes add up in the same order"


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_job_and_one_process_goes_on(one, tmp_path, launcher, rank):
    folder = tmp_path / "run"
    status, log = finish(start(folder, 2, launcher=launcher, at=[rank, 1, EPOCHS - 1], die=True), BOUND)
    assert status != 0, log[-3000:]
    assert list(digests(folder)) == ["000"]
    assert (folder / "work/001/last.ckpt").exists()
    epochs = []
    run(folder, at=(0, 1, EPOCHS - 2), doing=lambda: epochs.append(1))
    assert not epochs, "the epochs before the last one are not trained again"
    check_same(one, folder)


def test_one_process_goes_on_where_the_two_before_had_a_disk_of_their_node(one, tmp_path, monkeypatch):
    folder, disk = tmp_path / "run", tmp_path / "disk"
    monkeypatch.setenv("BDISTIL_SCRATCH", str(disk))
    status, log = finish(start(folder, 2, at=[1, 1, 1], die=True), BOUND)
    assert status != 0, log[-3000:]
    (teacher,) = disk.glob("bdistil-run-*/ledger/train/teacher.f32")
    asked = teacher.stat().st_ino
    run(folder)
    assert teacher.stat().st_ino == asked, "what two processes wrote is read by one"
    assert not (folder / "ledger").exists()
    shutil.copytree(teacher.parents[1], folder / "ledger")  # where the tests look
    check_same(one, folder)


def script(folder):
    run(Path(folder), at=(0, 1, 1), doing=kill)


def test_two_processes_go_on_with_the_run_of_one(one, tmp_path):
    folder = tmp_path / "run"
    assert in_child(tmp_path / "log", script, str(folder)) == -signal.SIGKILL
    assert list(digests(folder)) == ["000"]
    check_same(one, finished(folder, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_ends_cleanly_when_asked(one, two, tmp_path, number):
    """The signal goes to all processes, as that of a terminal; the next start gives the bits of a whole run."""
    folder = tmp_path / "run"
    process = start(folder, 2, pause=0.05)
    while not (folder / "work/001/last.ckpt").exists():
        assert process.poll() is None, finish(process)[1][-5000:]
    os.killpg(process.pid, number)
    status, log = finish(process)
    assert status != 0
    assert log.count("was interrupted with 1 of 2 rounds committed. Give the same command again") == 1, log[-5000:]
    assert digests(finished(folder, 2)) == digests(two)
