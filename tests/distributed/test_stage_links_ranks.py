"""Students that build on activations on two real processes: each caches the activations of its samples."""

import pytest
import torch
from helpers.toys import CLASSES, FEATURES, Toys, boost, by_hand, ledger, make_teacher, on_ranks, samples, settings_for
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
    run = tmp_path / "run"
    assert on_ranks(tmp_path, script, run) == [0, 0], (tmp_path / "rank0.log").read_text()[-5000:]
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
