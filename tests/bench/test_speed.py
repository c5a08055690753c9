"""What the framework costs beside the training it does: ratios within one process, interleaved, smallest CPU time.

`make bench` prints the ratios and asserts their bounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bdistil import BoostingSettings, Student
from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.part import Part
from bdistil.callbacks import RoundController
from bdistil.data.loaders import indexed_loaders
from bdistil.models.convnets import ConvStudent

pytestmark = pytest.mark.slow

SAMPLES, OUTPUTS = 5120, 10
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


class Noise(pl.LightningDataModule):
    """Random images; what they show does not matter to the clock."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 1, 28, 28, generator=generator)
        self.data = TensorDataset(x, torch.randint(OUTPUTS, (samples,), generator=generator))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=128, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*(t[:128] for t in self.data.tensors)), batch_size=128)


class Plain(pl.LightningModule):
    """The yardstick: MSE to cached logits, the same optimizer, the index in the batch for the look-up."""

    def __init__(self, student: nn.Module, logits: Tensor) -> None:
        super().__init__()
        self.student, self.logits = student, [logits]

    def training_step(self, batch: tuple[Tensor, Tensor, object], batch_idx: int) -> Tensor:
        x, _, index = batch
        return F.mse_loss(self.student(x), self.logits[0][index])

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Never called: no validation batches on either side."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), 1e-2, weight_decay=1e-4, fused=True)


class EpochClock(pl.Callback):
    """CPU seconds of each epoch, from its first batch to the end of its hooks."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.process_time()
        if trainer.current_epoch:
            self.epochs.append(now - self.started)
        self.started = now


def mlp() -> Student:
    body = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return Student(body, nn.Linear(32, OUTPUTS))


def conv() -> Student:
    return ConvStudent(channels=(16, 32))  # a step of 5 ms or more, on a fast core too


def teacher() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, OUTPUTS))


def plain_epochs(student: nn.Module, epochs: int) -> list[float]:
    clock, data = EpochClock(), Noise()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[clock], enable_checkpointing=False, **QUIET)
    with indexed_loaders(data, seed=0):
        trainer.fit(Plain(student, torch.randn(SAMPLES, OUTPUTS)), data)
    return clock.epochs


def round_epochs(folder: Path, make: Callable[[], Student], rounds: list[int], epochs: int) -> dict[int, list[float]]:
    """Epochs of some rounds of a run whose other rounds are of one epoch."""
    settings = BoostingSettings(rounds=max(rounds) + 1, accept="margin", margin_share=0.0)
    controller = RoundController(folder, teacher=teacher(), student=lambda round: make(), settings=settings)
    data, times = Noise(), {}
    for module in controller.rounds(data):
        clock = EpochClock()
        trainer = pl.Trainer(
            max_epochs=epochs if module.number in rounds else 1, callbacks=[clock, controller], **QUIET
        )
        trainer.fit(module, data, ckpt_path=controller.ckpt_path)
        times[module.number] = clock.epochs
    return {number: times[number] for number in rounds}


# Ratios of neighbouring fits, and their median: what other programs do to one turn does not decide.
@pytest.mark.parametrize(("make", "bound", "turns"), [(conv, 1.10, 10), (mlp, None, 12)], ids=["conv", "mlp"])
def test_an_epoch_of_a_round_costs_little_more_than_a_plain_one(tmp_path, record, make, bound, turns):
    """Its saving included. Bounded where a step takes 5 ms or more; measured and printed for shorter steps."""
    ratios, steps = [], []
    for turn in range(turns):
        plain = min(plain_epochs(make(), 7))
        ratios.append(min(round_epochs(tmp_path / str(turn), make, [1], 7)[1]) / plain)
        steps.append(plain / (SAMPLES / 128) * 1e3)
    ratio, step = statistics.median(ratios), statistics.median(steps)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"\nepoch of a round / plain quiet Trainer, step {step:.2f} ms: {ratio:.3f}, {spread} (bound {bound})")
    record(f"epoch of a round / plain epoch, {make.__name__}", ratio)
    assert bound is None or ratio <= bound


def test_comparing_samples_costs_less_than_a_hundredth_of_an_epoch(tmp_path, record, monkeypatch):
    """CPU time of comparing samples with those that the teacher was asked about, in the epochs of three rounds."""
    spent = [0.0]

    def timed(method):
        def call(self, *args):
            started = time.process_time()
            method(self, *args)
            spent[0] += time.process_time() - started

        return call

    monkeypatch.setattr(Part, "compare_batch", timed(Part.compare_batch))
    epochs = round_epochs(tmp_path, conv, [0, 1, 2], 7)
    whole = sum(7 * statistics.mean(times) for times in epochs.values())  # the clock leaves out the last epoch
    print(f"\ncomparing samples / epochs, step {whole / 21 / (SAMPLES / 128) * 1e3:.1f} ms: {spent[0] / whole:.4f}")
    record("comparing samples / epochs", spent[0] / whole)
    assert spent[0] <= 0.01 * whole


def test_round_16_costs_what_round_2_does(tmp_path, record):
    turns = [round_epochs(tmp_path / str(turn), mlp, [1, 15], 12) for turn in range(5)]
    ratio = min(min(times[15]) for times in turns) / min(min(times[1]) for times in turns)
    print(f"\nepoch of round 16 / of round 2: {ratio:.3f} (bound 1.15)")
    record("epoch of round 16 / of round 2", ratio)
    assert ratio <= 1.15


def test_a_commit_costs_about_one_pass(tmp_path, record):
    """Verdict and commit of a round: the pass over the training part, the ledger, the files; against the bare pass."""
    settings = BoostingSettings(rounds=5, accept="margin", margin_share=0.0)
    controller = RoundController(tmp_path, teacher=teacher(), student=lambda round: conv(), settings=settings)
    data, commits, passes = Noise(), [], []
    close = controller._close

    def timed(trainer: pl.Trainer) -> None:
        passes.append(bare_pass(controller.plan.module.student, controller.boosting.students, data))
        started = time.process_time()
        close(trainer)
        commits.append(time.process_time() - started)

    controller._close = timed
    for module in controller.rounds(data):
        trainer = pl.Trainer(max_epochs=1, callbacks=[controller], **QUIET)
        trainer.fit(module, data, ckpt_path=controller.ckpt_path)
    ratio = min(commits) / min(passes)
    print(f"\nverdict and commit of a round / one evaluation pass: {ratio:.3f} (bound 1.5)")
    record("commit of a round / evaluation pass", ratio)
    assert ratio <= 1.5


@torch.no_grad()
def bare_pass(student: nn.Module, earlier: list[nn.Module], data: Noise) -> float:
    """A plain evaluation of the student over the training part, in the same blocks."""
    student.eval()
    started = time.process_time()
    for x, _ in DataLoader(data.data, batch_size=BLOCK):
        linked = [earlier[-1].features(x)] if earlier else []
        student(x, linked)
    return time.process_time() - started
