"""A run of toys for several processes, and what starts and ends them. As a script, it is what each process runs.

Students have neither dropout nor batch statistics, which are drawn and taken by rank: with one global batch, any number
of processes trains the same student but for rounding.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from helpers.processes import BUSY, end
from helpers.toys import CLASSES, FEATURES, WIDTH, Hook, Toys, control, make_trainer, settings_for
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import Rung, Student
from bdistil.callbacks import LossMixing
from bdistil.distillation import MixingSettings

TRAIN, VAL, GLOBAL_BATCH, ROUNDS, EPOCHS = 2112, 600, 32, 2, 3  # five blocks of rows: a group for each of two processes
SETTINGS = settings_for(ROUNDS, ladder=[Rung(0), Rung(1)])
MIXING = MixingSettings(mode="convex", warmup=1, every=1)
BOUND = BUSY  # seconds in which a job with a dead process has ended


class Batches(Toys):
    """Its global batch does not depend on the number of processes."""

    def __init__(self, processes):
        super().__init__(train=TRAIN, val=VAL)
        self.size = GLOBAL_BATCH // processes

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.parts["train"]), batch_size=self.size, shuffle=True)


def make_student(round):
    return Student(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh()), nn.Linear(WIDTH, CLASSES))


def run(run_dir, processes=1, nodes=1, at=None, doing=None, pause=0.0, strategy="auto", timeout=None, mixing=False):
    """A whole run; at (rank, round, epoch), a process does something to itself."""

    def look(trainer, module):
        if module.number == ROUNDS - 1:
            time.sleep(pause)
        if at and (trainer.global_rank, module.number, trainer.current_epoch) == tuple(at) and trainer.global_step % 5:
            doing()

    controller, data = control(run_dir, settings=SETTINGS, student=make_student), Batches(processes)
    for module in controller.rounds(data):
        # A strategy belongs to its Trainer, so that each round has its own.
        own = DDPStrategy(timeout=timedelta(seconds=timeout)) if timeout else strategy
        beside = [LossMixing(MIXING)] if mixing else []
        trainer = make_trainer(
            Hook(on_train_batch_start=look), *beside, controller, epochs=EPOCHS, devices=processes // nodes,
            num_nodes=nodes, strategy=own,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=controller.ckpt_path)
    return controller


def start(run_dir, processes, *, launcher="torchrun", prefix=(), words=(), env=None, nodes=1, **options):
    """Starts the processes of one node; what they say is in a file beside the run."""
    here = Path(__file__)
    paths = [str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    by = {"torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", str(processes // nodes), *words]}
    if launcher == "torchrun" and not words:
        by["torchrun"].append("--standalone")
    given = json.dumps({"processes": processes, "nodes": nodes, "strategy": "ddp", **options})
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
    path = run_dir.with_name(f"{run_dir.name}.{len(list(run_dir.parent.glob('*.log')))}.log")
    with open(path, "w") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, *by.get(launcher, []), str(here), str(run_dir), given],
            env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process.path = path
    return process


def finish(process, seconds=BOUND):
    """Status and words of a job that ends by itself; one that hangs is killed and fails the test."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"the job hangs:\n{said(process)[-5000:]}") from None
    return process.returncode, said(process)


def finished(run_dir, processes, **options):
    """Starts a job that is to go well; gives its folder when it has."""
    status, log = finish(start(run_dir, processes, **options))
    assert status == 0, log[-5000:]
    return run_dir


def said(process):
    return process.path.read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    if options.pop("die", False):
        options["doing"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    run(Path(sys.argv[1]), **options)
