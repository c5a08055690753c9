"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bdistil.errors import UserError
from bdistil.functional.distillation import at_least_float32
from bdistil.metrics.quality import Task, as_columns


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher of a recipe.

    Attributes:
        network: maps x to logits (B, L).
        checkpoint: a safetensors file, or one of `torch.save`, with its weights. Without it the recipe trains it.
        epochs: of that training, on the training part.
        lr: largest learning rate of that training, on a cosine over the epochs.
        weight_decay: of the optimizer.
        optimizer: `adamw`, or `sgd` with Nesterov's momentum of 0.9.
        warmup: of the epochs, how many the learning rate climbs to `lr` in.
        label_smoothing: share of the target that all classes have alike.
    """

    network: nn.Module
    checkpoint: str | None = None
    epochs: int = 15
    lr: float = 3e-3
    weight_decay: float = 1e-2
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.epochs or not 0 <= self.label_smoothing < 1:
            raise UserError(
                "Expected `warmup` in 0 … epochs - 1 and `label_smoothing` in [0, 1) of model.teacher, "
                f"got {self.warmup} of {self.epochs} and {self.label_smoothing}."
            )
        if self.epochs < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise UserError(
                "Expected `epochs` >= 1, `lr` > 0 and `weight_decay` >= 0 of model.teacher, "
                f"got {self.epochs}, {self.lr} and {self.weight_decay}."
            )
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise UserError(
                f"Expected `model.teacher.checkpoint` to be a file, got {self.checkpoint!r}, which is not there. "
                "Leave it out to have the teacher trained by the recipe."
            )


class TeacherTraining(pl.LightningModule):
    """Trains a teacher on the labels: cross entropy, or squared error of real outputs; a warm-up, a cosine.

    Args:
        spec: network and schedule.
        task: classes, or real outputs.
    """

    def __init__(self, spec: TeacherSpec, task: Task = "classification") -> None:
        super().__init__()
        self.network, self.spec, self.task = spec.network, spec, task
        self._sums = torch.zeros(2)

    def training_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> Tensor:
        """Loss of a batch (x, y, index)."""
        x, y, _ = batch
        answers = at_least_float32(self.network(x))
        if self.task == "regression":
            return F.mse_loss(answers, as_columns(y, answers.shape[-1]).to(answers.dtype))
        return F.cross_entropy(answers, y, label_smoothing=self.spec.label_smoothing)

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self._sums = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> None:
        """Counts right answers, or adds up squared errors."""
        x, y, _ = batch
        answers = at_least_float32(self.network(x))
        if self.task == "regression":
            score = (answers - as_columns(y, answers.shape[-1])).square().mean(-1).sum()
        else:
            score = (answers.argmax(-1) == y).sum()
        self._sums += torch.stack((score, score.new_full((), len(y))))

    def on_validation_epoch_end(self) -> None:
        """Logs the teacher's accuracy, or its rms error."""
        score, samples = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        regression = self.task == "regression"
        name, value = "rms error" if regression else "accuracy", score / samples
        self.log(f"teacher {name}", value.sqrt() if regression else value, prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        """The optimizer, fused where the precision allows it; its rate climbs for some epochs, then takes a cosine."""
        spec = self.spec
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if spec.optimizer == "sgd" else {}
        kind = torch.optim.SGD if spec.optimizer == "sgd" else torch.optim.AdamW
        options |= {"weight_decay": spec.weight_decay, "fused": str(self.trainer.precision) != "16-mixed"}
        optimizer = kind(self.network.parameters(), spec.lr, **options)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, spec.epochs - spec.warmup)
        if not spec.warmup:
            return [optimizer], [cosine]
        climb = lr_scheduler.LinearLR(optimizer, 1 / (spec.warmup + 1), total_iters=spec.warmup)
        return [optimizer], [lr_scheduler.SequentialLR(optimizer, [climb, cosine], [spec.warmup])]
