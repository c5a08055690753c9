"""Students that build on activations on two real processes: each caches the activations of its samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import BUSY, started
from helpers.toys import CLASSES, FEATURES, Toys, boost, by_hand, ledger, make_teacher, samples, settings_for
from torch import nn

from bdistil import ProgressiveEnsemble, Rung, Student

pytestmark = pytest.mark.distributed

TRAIN = 1100  # three blocks of 512 rows: one process has two of them


def make(round, width=1.0):
    stages = [nn.Sequential(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()) for i, o in ((FEATURES, 7), (7, 5), (5, 6))]
    return Student(stages=stages, head=nn.Linear(6, CLASSES))


def script(folder):
    settings = settings_for(3, ladder=[Rung(0), Rung(1, "deep", at=1)], loss="prefix_kl+game")
    boost(
        folder, Toys(train=TRAIN), student=make, settings=settings,
        trainer={"strategy": "ddp", "devices": 2, "epochs": 1},
    )  # fmt: skip


def test_two_processes_keep_exact_errors_and_cached_activations(tmp_path):
    paths, run, log = (
        [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")],
        tmp_path / "run",
        tmp_path / "log",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, run]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with open(log, "w") as file, started(command, env=environment, stdout=file, stderr=file) as process:
        try:
            assert process.wait(BUSY) == 0, log.read_text()[-5000:]
        except subprocess.TimeoutExpired:
            pytest.fail(f"the ranks hang:\n{log.read_text()[-5000:]}")
    ensemble, x = ProgressiveEnsemble.load(run), samples(TRAIN, 11)[0]
    expected = by_hand(ensemble, make_teacher(), x)
    torch.testing.assert_close(ledger(run, count=TRAIN)[1], expected.error, atol=2e-5, rtol=1e-5)
    runner = ensemble.stage_runner(x)
    for _ in range(2):
        runner.advance()
    cached = torch.from_file(str(run / "ledger/train/features.002.1.f16"), size=TRAIN * 7, dtype=torch.float16)
    third = ensemble.students[2]
    read = [runner.activations[place] for place in ensemble.wiring.reads[2]]
    torch.testing.assert_close(cached.view(TRAIN, 7).float(), third.activations(x, read)[0], atol=2e-3, rtol=2e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    script(Path(sys.argv[1]))
