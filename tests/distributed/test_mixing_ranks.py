"""Mixing on two real processes: the weights of one, each process writes its rows, and a kill costs nothing."""

import os
import signal

import numpy as np
import pytest
from helpers.job import ROUNDS, TRAIN, run
from helpers.toys import digests, on_ranks

from bdistil import ProgressiveEnsemble

pytestmark = pytest.mark.distributed


def mixed(run_dir, nodes=1, **options):
    """What each process runs."""
    run(run_dir, 2, nodes, strategy="ddp", mixing=True, **options)


def killed(run_dir):
    """The same; the second process ends in the second round."""
    mixed(run_dir, at=(1, 1, 2), doing=lambda: os.kill(os.getpid(), signal.SIGKILL))


def shares(run_dir):
    """The weights learned in each round, (N,)."""
    files = [run_dir / f"mixing/mixing.{number:03d}.f32" for number in range(ROUNDS)]
    return [np.fromfile(file, "<f4") for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert on_ranks(folder, mixed, folder / "run") == [0, 0], (folder / "rank0.log").read_text()[-5000:]
    return folder / "run"


def test_two_processes_learn_the_weights_of_one(two, tmp_path):
    run(tmp_path / "run", mixing=True)
    for mine, theirs in zip(shares(two), shares(tmp_path / "run"), strict=True):
        assert mine.shape == (TRAIN,)
        assert mine.std() > 0.1
        # Students differ by rounding, and so do gradients; all weights move by a rate of 0.05 ten times an update.
        assert np.abs(mine - theirs).max() < 1e-3
    one, both = (ProgressiveEnsemble.load(folder) for folder in (tmp_path / "run", two))
    for mine, theirs in zip(both.parameters(), one.parameters(), strict=True):
        assert float((mine - theirs).abs().max()) < 1e-3


def test_a_process_that_is_killed_costs_no_weight(two, tmp_path):
    assert -signal.SIGKILL in on_ranks(tmp_path, killed, tmp_path / "run")
    assert list(digests(tmp_path / "run")) == ["000"]
    assert on_ranks(tmp_path, mixed, tmp_path / "run") == [0, 0], (tmp_path / "rank0.log").read_text()[-5000:]
    assert digests(tmp_path / "run") == digests(two)
    for mine, theirs in zip(shares(tmp_path / "run"), shares(two), strict=True):
        assert np.array_equal(mine, theirs)


def test_nodes_with_a_ledger_on_a_disk_each_share_the_weights(two, tmp_path):
    disks = {rank: {"BDISTIL_SCRATCH": str(tmp_path / f"disk{rank}")} for rank in range(2)}
    found = on_ranks(tmp_path, mixed, tmp_path / "run", 2, nodes=2, own=disks)
    assert found == [0, 0], (tmp_path / "rank0.log").read_text()[-5000:]
    assert digests(tmp_path / "run") == digests(two)
    for mine, theirs in zip(shares(tmp_path / "run"), shares(two), strict=True):
        assert np.array_equal(mine, theirs)
    assert len(list(tmp_path.glob("disk*/*/ledger/train/teacher.f32"))) == 2
    assert not list(tmp_path.glob("disk*/**/mixing*"))
