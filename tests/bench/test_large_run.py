"""A whole run on two processes at ImageNet's number of samples and classes: what a process holds, beside a small run.

N = 1,281,167 by L = 1,000 in float16: needs some 13 GB of disk, and minutes. Samples are tiny: not they are measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.toys import control, curve, make_trainer, settings_for
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import Rung, Student
from bdistil.utils.memory import keep_freed_memory

pytestmark = pytest.mark.slow

SAMPLES, SMALL, VAL, CLASSES, FEATURES, BATCH, ROUNDS = 1_281_167, 160_146, 4096, 1000, 16, 256, 2
# What a sample may add to a process: x, y, its place in an order, sums of its block. A row of the ledger is 2,000.
BYTES_A_SAMPLE = 200


class Points(L.LightningDataModule):
    """Samples of a thousand classes, told apart by their place."""

    def __init__(self, count):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)

        def part(size):
            y = torch.randint(CLASSES, (size,), generator=generator)
            return TensorDataset(centres[y] + torch.randn(size, FEATURES, generator=generator), y)

        self.train, self.val, self.centres = part(count), part(VAL), centres

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=BATCH // 2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=BATCH)


def make_teacher(centres):
    """The best there is for these samples: the nearest centre."""
    teacher = nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        teacher.weight.copy_(centres)
        teacher.bias.copy_(-centres.square().sum(1) / 2)
    return teacher


def make_student(round):
    return Student(nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU()), nn.Linear(4, CLASSES))


def rank_of_a_run(run_dir: Path, count: int) -> None:
    """One process of a whole run; leaves the most bytes that it held."""
    torch.set_num_threads(1)
    keep_freed_memory()
    data = Points(count)
    settings = settings_for(ROUNDS, storage="float16", ladder=[Rung(0)])
    controller = control(run_dir, settings=settings, student=make_student, teacher=make_teacher(data.centres))
    for module in controller.rounds(data):
        trainer = make_trainer(controller, epochs=1, devices=2, strategy="ddp", use_distributed_sampler=False)
        trainer.fit(module, data, ckpt_path=controller.ckpt_path)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run_dir.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(held))


def run(folder: Path, count: int) -> int:
    """A whole run; gives the most bytes that one of its processes held."""
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path; import tests.bench.test_large_run as t; "
    )
    program += f"t.rank_of_a_run(Path({str(folder)!r}), {count})"
    script = folder.with_suffix(".py")
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return max(json.loads(folder.with_suffix(f".{rank}.json").read_text()) for rank in range(2))


def test_a_run_of_the_size_of_imagenet(tmp_path):
    small, large = run(tmp_path / "small", SMALL), run(tmp_path / "large", SAMPLES)
    more = (large - small) / (SAMPLES - SMALL)
    *_, first, last = (float(row["val_accuracy"]) for row in curve(tmp_path / "large"))
    seconds = [float(row["seconds"]) for row in curve(tmp_path / "large")[1:]]
    print(f"\n{small / 2**30:.2f} GiB held for N = {SMALL:,}, {large / 2**30:.2f} for {SAMPLES:,}: {more:.0f} B each")
    print(f"rounds of {seconds} s; accuracy on validation {first:.3f}, then {last:.3f}")
    assert large < 2 << 30
    assert more < BYTES_A_SAMPLE
    assert last > first
