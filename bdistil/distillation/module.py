"""Distillation of one student, without boosting: what `LossMixing` and `GradientNoise` are at home in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.data.loaders.indexing import Index
from bdistil.distillation.last_layer import last_layers
from bdistil.errors import UserError
from bdistil.functional.distillation import at_least_float32, kd_terms
from bdistil.functional.gradient_noise import scheduled_weight
from bdistil.functional.loss_mixing import mixed_loss
from bdistil.teachers.wrappers import FrozenTeacher

# Where `auto` starts, before the first look at the gradient.
CAUTIOUS = 0.1


class Distillation(pl.LightningModule):
    """One student, one or several teachers: (1 - w) CE + w tau^2 KL, or the weights of `LossMixing` sample by sample.

    Args:
        student: maps x to logits (B, L), and ends with a linear layer.
        teacher: a module (x -> logits), or several.
        distillation_weight: w in 0 … 1; `auto` follows what `GradientNoise` suggests.
        weight_factor: w decays (< 1) or grows (> 1) by this factor an epoch.
        temperature: tau.
        unbiased: adds w times the mean control variate of an epoch's start, as SVRG does: the teacher then takes noise
            away and pulls to no fault of its own. Costs a pass over the training part an epoch.
        lr: learning rate of AdamW, on a cosine over the epochs. Override `configure_optimizers` for another one.
        weight_decay: of AdamW.

    Raises:
        UserError: a weight, factor or temperature that cannot be.
    """

    teachers: list[FrozenTeacher]
    # Weights (B, K) of samples, set by LossMixing.
    sample_weights: Callable[[Index], Tensor] | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        *,
        distillation_weight: float | Literal["auto"] = 0.9,
        weight_factor: float = 1.0,
        temperature: float = 4.0,
        unbiased: bool = False,
        lr: float = 1e-2,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        given = distillation_weight
        if given != "auto" and (isinstance(given, str) or not 0 <= given <= 1):
            raise UserError(f"Expected `distillation_weight` to be in 0 … 1, or 'auto', got {given!r}.")
        if weight_factor <= 0 or temperature <= 0:
            raise UserError(f"Expected `weight_factor` and `temperature` > 0, got {weight_factor} and {temperature}.")
        self.student, self.last_layer = student, last_layers(student)[-1]
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        # Out of the module tree: in no checkpoint, and never in train mode.
        object.__setattr__(self, "teachers", [FrozenTeacher(module) for module in teachers])
        self.distillation_weight, self.weight_factor, self.temperature = distillation_weight, weight_factor, temperature
        self.unbiased, self.lr, self.weight_decay = unbiased, lr, weight_decay
        self.weight = CAUTIOUS if isinstance(distillation_weight, str) else float(distillation_weight)
        self._control: list[Tensor] = []

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of the student, float32 also in mixed precision."""
        return at_least_float32(self.student(x))

    def teacher_logits(self, x: Any, index: Index | None = None) -> Tensor:
        """Logits of the teacher (B, L), or of M teachers (M, B, L)."""
        answers = [at_least_float32(teacher(x)) for teacher in self.teachers]
        return answers[0] if len(answers) == 1 else torch.stack(answers)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """The loss of a batch (x, y), or (x, y, index) beside LossMixing."""
        x, y = batch[0], batch[1]
        index: Any = batch[2] if len(batch) > 2 else None
        terms = kd_terms(self(x), self.teacher_logits(x, index), y, temperature=self.temperature)
        if self.sample_weights is not None:
            return mixed_loss(terms, self.sample_weights(index))
        kl = terms.kl if terms.kl.ndim == 1 else terms.kl.mean(0)
        loss = ((1.0 - self.weight) * terms.ce + self.weight * kl).mean()
        pull = zip(self._control, self.student.parameters(), strict=False)
        return loss + self.weight * sum(((c * p).sum() for c, p in pull), torch.zeros((), device=self.device))

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Logs accuracy and cross entropy."""
        logits = self(batch[0])
        right = (logits.argmax(-1) == batch[1]).float().mean()
        scores = {"val_accuracy": right, "val_loss": F.cross_entropy(logits, batch[1])}
        self.log_dict(scores, batch_size=len(batch[1]), prog_bar=True, sync_dist=True)

    # ---- hooks

    def on_fit_start(self) -> None:
        """Moves the teachers to the device; `auto` needs somebody to follow."""
        for teacher in self.teachers:
            teacher.to(self.device)
        # By name: callbacks import this module's layer, not the other way round.
        seen = [type(callback).__name__ for callback in self.trainer.callbacks]  # type: ignore[attr-defined]
        if self.distillation_weight == "auto" and "GradientNoise" not in seen:
            raise UserError(
                "`distillation_weight: auto` follows the GradientNoise callback, which this Trainer lacks. "
                "Add bdistil.callbacks.GradientNoise(), or give a number."
            )

    def on_train_epoch_start(self) -> None:
        """The weight of this epoch, and the control variate that is taken for its mean."""
        if not isinstance(self.distillation_weight, str):
            self.weight = scheduled_weight(self.distillation_weight, self.weight_factor, self.current_epoch)
        if self.unbiased:
            self._control = self.control_variate()

    def control_variate(self) -> list[Tensor]:
        """Mean over the training part of grad CE - grad KL, one tensor a parameter of the student."""
        loader: Any = self.trainer.train_dataloader
        total, samples = [torch.zeros_like(p) for p in self.student.parameters()], 0
        training = self.student.training
        self.student.eval()
        for batch in torch.utils.data.DataLoader(
            loader.dataset, batch_size=512, collate_fn=loader.collate_fn, generator=torch.Generator()
        ):
            x, y = batch[0], batch[1]
            x, y = self.trainer.strategy.batch_to_device((x, y), self.device)
            index: Any = batch[2] if len(batch) > 2 else None
            terms = kd_terms(self(x), self.teacher_logits(x, index), y, temperature=self.temperature)
            kl = terms.kl if terms.kl.ndim == 1 else terms.kl.mean(0)
            gradients = torch.autograd.grad((terms.ce - kl).sum(), list(self.student.parameters()))
            total, samples = [t + g for t, g in zip(total, gradients, strict=True)], samples + len(y)
        self.student.train(training)
        return [part / samples for part in total]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the weight that `auto` has come to."""
        checkpoint["distillation_weight"] = self.weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with it."""
        self.weight = float(checkpoint["distillation_weight"])

    def configure_optimizers(self) -> Any:
        """AdamW on a cosine over the epochs."""
        optimizer = torch.optim.AdamW(self.student.parameters(), self.lr, weight_decay=self.weight_decay)
        epochs = self.trainer.max_epochs or -1
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)] if epochs > 0 else []


def generations(
    make_student: Callable[[], nn.Module], teacher: nn.Module, times: int, **options: Any
) -> Iterator[Distillation]:
    """Repeated self-distillation: each student is the teacher of the next one.

    Args:
        make_student: makes a student.
        teacher: of the first student.
        times: how many students.
        options: of `Distillation`.

    Yields:
        A module; fit it before the next one is asked for.
    """
    for _ in range(times):
        student = make_student()
        yield Distillation(student, teacher, **options)
        teacher = student
