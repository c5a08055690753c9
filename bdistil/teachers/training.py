"""Training of a teacher on the labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torchmetrics import MeanMetric

from bdistil.errors import UserError
from bdistil.functional.distillation import at_least_float32
from bdistil.metrics.quality import Task, class_sums
from bdistil.teachers.wrappers import comes_trained, run_teacher
from bdistil.utils.optimizers import may_fuse
from bdistil.utils.paths import user_path


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher of a recipe.

    Attributes:
        network: maps x to logits (B, L).
        checkpoint: safetensors or `torch.save` file with its weights; without one the recipe trains the network.
        epochs: number of epochs on the training part.
        lr: peak learning rate; it follows a cosine over the epochs.
        weight_decay: weight decay of the optimizer.
        optimizer: `adamw`, or `sgd` with a Nesterov momentum of 0.9.
        warmup: number of epochs in which the learning rate rises linearly to `lr`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
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
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", str(user_path(self.checkpoint, "model.teacher.checkpoint")))
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise UserError(
                f"Expected `model.teacher.checkpoint` to be a file, got {self.checkpoint!r}, which is not there. "
                "Leave it out to have the teacher trained by the recipe."
            )


class TeacherTraining(pl.LightningModule):
    """Trains a teacher with cross entropy (binary for multilabel tasks), or with squared error for regression.

    Args:
        spec: network and schedule.
        task: classification or regression.
    """

    def __init__(self, spec: TeacherSpec, task: Task = "classification") -> None:
        super().__init__()
        self.network, self.spec, self.task = spec.network, spec, task
        self._score = MeanMetric()

    def on_train_epoch_start(self) -> None:
        """Leaves frozen parts in eval mode, such as a backbone, or a trained network of an `AveragedTeacher`."""
        for part in self.network.modules():
            own = list(part.parameters())
            if comes_trained(part) or (own and not any(parameter.requires_grad for parameter in own)):
                part.eval()

    def training_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> Tensor:
        """Loss of a batch (x, y, index)."""
        x, y, _ = batch
        answers = at_least_float32(run_teacher(self.network, x))
        if self.task == "regression":
            return F.mse_loss(answers, y.reshape(answers.shape).to(answers.dtype))
        if self.task == "multilabel":
            known, target = y.reshape(answers.shape) >= 0, y.reshape(answers.shape).clamp(min=0).to(answers.dtype)
            return F.binary_cross_entropy_with_logits(answers, target, known.to(answers.dtype))
        return F.cross_entropy(answers, y, label_smoothing=self.spec.label_smoothing)

    def validation_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> None:
        """Accumulates the accuracy (for multilabel tasks, its mean over labels) or the squared error of a batch."""
        x, y, _ = batch
        answers = at_least_float32(run_teacher(self.network, x))
        if self.task == "regression":
            self._score.update((answers - y.reshape(answers.shape)).square().mean(-1))
        elif self.task == "multilabel":
            labels = y.reshape(answers.shape)
            self._score.update(((answers > 0) == (labels > 0))[labels >= 0].float())
        else:
            right, _, samples = class_sums(answers, y)
            self._score.update(right / samples.clamp(min=1), weight=samples)

    def on_validation_epoch_end(self) -> None:
        """Logs the teacher's accuracy, or its rms error."""
        value, regression = self._score.compute(), self.task == "regression"
        self._score.reset()
        name = "teacher rms error" if regression else "teacher accuracy"
        self.log(name, value.sqrt() if regression else value, prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        """The optimizer, fused where the precision allows it, with warm-up and cosine."""
        spec = self.spec
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if spec.optimizer == "sgd" else {}
        kind = torch.optim.SGD if spec.optimizer == "sgd" else torch.optim.AdamW
        options |= {"weight_decay": spec.weight_decay, "fused": may_fuse(self.trainer, self.network)}
        optimizer = kind(self.network.parameters(), spec.lr, **options)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, spec.epochs - spec.warmup)
        if not spec.warmup:
            return [optimizer], [cosine]
        rise = lr_scheduler.LinearLR(optimizer, 1 / (spec.warmup + 1), total_iters=spec.warmup)
        return [optimizer], [lr_scheduler.SequentialLR(optimizer, [rise, cosine], [spec.warmup])]
