"""Mixing on two real processes: the weights of one, each process writes its rows, and a kill costs nothing."""

import socket

import numpy as np
import pytest
from helpers.job import ROUNDS, TRAIN, finish, run, start
from helpers.toys import digests

from bdistil import ProgressiveEnsemble

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("no_pictures")]


def shares(run_dir):
    """The weights learned in each round, (N,)."""
    files = [run_dir / f"mixing/mixing.{number:03d}.f32" for number in range(ROUNDS)]
    return [np.fromfile(file, "<f4") for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    status, log = finish(start(folder, 2, mixing=True))
    assert status == 0, log[-5000:]
    return folder


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
    status, _ = finish(start(tmp_path / "run", 2, mixing=True, at=(1, 1, 2), die=True))
    assert status != 0
    assert list(digests(tmp_path / "run")) == ["000"]
    status, log = finish(start(tmp_path / "run", 2, mixing=True))
    assert status == 0, log[-5000:]
    assert digests(tmp_path / "run") == digests(two)
    for mine, theirs in zip(shares(tmp_path / "run"), shares(two), strict=True):
        assert np.array_equal(mine, theirs)


def test_nodes_with_a_ledger_on_a_disk_each_share_the_weights(two, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = []
    for node in ("0", "1"):
        words = ["--nnodes", "2", "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
        env = {"BDISTIL_SCRATCH": str(tmp_path / f"disk{node}")}
        jobs.append(start(tmp_path / "run", 2, nodes=2, words=words, env=env, mixing=True))
    for job in jobs:
        status, log = finish(job)
        assert status == 0, log[-5000:]
    assert digests(tmp_path / "run") == digests(two)
    for mine, theirs in zip(shares(tmp_path / "run"), shares(two), strict=True):
        assert np.array_equal(mine, theirs)
    assert len(list(tmp_path.glob("disk*/*/ledger/train/teacher.f32"))) == 2
    assert not list(tmp_path.glob("disk*/**/mixing*"))
