"""What a recipe says under `model:`: the teacher, the student, the boosting; and the training of a missing teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import UserError
from bdistil.settings import BoostingSettings


@dataclass(frozen=True)
class TeacherSpec:
    """The teacher of a recipe.

    Attributes:
        network: maps x to logits (B, L).
        checkpoint: a safetensors file, or one of `torch.save`, with its weights. Without it the recipe trains it.
        epochs: of that training, on the training part.
        lr: largest learning rate of that training, on a cosine over the epochs.
        weight_decay: of AdamW.
    """

    network: nn.Module
    checkpoint: str | None = None
    epochs: int = 15
    lr: float = 3e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
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


class Distiller(pl.LightningModule):
    """Teacher, student and boosting of a recipe. It is not trained itself; each round has a module of its own.

    Args:
        teacher: the network, and how to come by its weights.
        student: makes one student; a class path with its arguments.
        boosting: settings of the run.
    """

    def __init__(
        self,
        teacher: TeacherSpec,
        student: Callable[[], nn.Module],
        boosting: BoostingSettings = BoostingSettings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.teacher, self.make, self.boosting = teacher, student, boosting

    def make_student(self, number: int, width: float = 1.0) -> nn.Module:
        """The student of a round, from 0; `width` is given to the class only where a rung asks for it."""
        make: Callable[..., nn.Module] = self.make
        return make() if width == 1 else make(width=width)


class TeacherTraining(pl.LightningModule):
    """Trains a teacher on the labels: cross entropy, AdamW, cosine.

    Args:
        spec: network and schedule.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.network, self.spec = spec.network, spec
        self._right = torch.zeros(2)

    def training_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> Tensor:
        """Cross entropy of a batch (x, y, index)."""
        x, y, _ = batch
        return F.cross_entropy(self.network(x), y)

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self._right = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Any, Tensor, Any], batch_idx: int) -> None:
        """Counts right answers."""
        x, y, _ = batch
        self._right += torch.stack(((self.network(x).argmax(-1) == y).sum(), torch.tensor(len(y), device=self.device)))

    def on_validation_epoch_end(self) -> None:
        """Logs the teacher's accuracy."""
        right, samples = self.trainer.strategy.reduce(self._right, reduce_op="sum")
        self.log("teacher accuracy", right / samples, prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        """AdamW on a cosine over the epochs."""
        fused = str(self.trainer.precision) != "16-mixed"
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.spec.lr, weight_decay=self.spec.weight_decay, fused=fused
        )
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.spec.epochs)]
