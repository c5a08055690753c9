"""Fits of a boring model in the place of rounds, with what a tracker reads of a run directory."""

import json

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

from bdistil.storage.run_directory import FORMAT

STEPS = 3
CURVE = [
    {"stage": "teacher", "macs": 900, "val_accuracy": 0.9},
    {"stage": 1, "macs": 10, "val_accuracy": 0.5, "latency_ms": 1.5, "reason": "the first"},
]


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss["loss"])
        return loss


def new_trainer(loggers, **options):
    return L.Trainer(
        accelerator="cpu", logger=loggers, limit_val_batches=0, log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"max_steps": STEPS, **options},
    )  # fmt: skip


def curve_row(number):
    return {"macs": 10 * number, "val_accuracy": 0.9 - number / 10, "why": "x"}


def commit(run, number):
    """A committed round on the disk."""
    place = run.folder(number)
    place.mkdir(parents=True)
    (place / "student.safetensors").write_bytes(b"weights")
    record = {"format": FORMAT, "round": number, "steps": STEPS, "curve": curve_row(number)}
    (place / "round.json").write_text(json.dumps(record))


def fit_round(tracker, loggers, number):
    """A fit, its round committed and logged."""
    trainer = new_trainer(loggers)
    tracker.start(trainer, number)
    trainer.fit(Model())
    if not tracker.run.folder(number).exists():
        commit(tracker.run, number)
    tracker.committed(trainer, curve_row(number), number)
