"""Stage 2 of MEKD: a student whose answers map to the teacher's samples through the frozen generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.distillation.mekd.networks import Generator
from bdistil.distillation.mekd.stage import EmulationStage
from bdistil.errors import UserError
from bdistil.functional.mekd import hard_emulation, soft_emulation
from bdistil.utils.optimizers import adamw_cosine
from bdistil.utils.seeding import reseed

Optimizer = Literal["sgd", "adamw"]


class MappingEmulation(EmulationStage):
    """Stage 2: trains a student on (x, y), y the teacher's logits (B, L), through the frozen generator.

    Validation needs no labels: `mekd/agreement` is the share of samples on which student and teacher give the same
    class, `mekd/val_loss` the cross entropy of the student to the teacher.

    Args:
        student: maps x to logits (B, L).
        generator: trained generator of stage 1; None omits the first part of the loss, leaving plain distillation.
        hard: the teacher answers with labels; y are one-hots of any norm.
        mean: mean of the teacher's centred logits (L,), see `bdistil.functional.statistics`; for soft answers.
        sd: standard deviation of the teacher's centred logits (L,).
        tau: temperature of soft answers.
        kl: weight of the second part of the loss.
        optimizer: `sgd`, as in the paper, has momentum 0.9 and divides its learning rate by 10 after one third and
            after two thirds of the steps; `adamw` has a cosine schedule that ends at 0.
        lr: learning rate of the optimizer.
        seed: determines, with the epoch, all randomness.

    Raises:
        UserError: an argument is out of its range, or mean and sd are missing.
    """

    generator: Generator | None

    def __init__(
        self,
        student: nn.Module,
        generator: Generator | None,
        *,
        hard: bool,
        mean: Tensor | None = None,
        sd: Tensor | None = None,
        tau: float = 5.0,
        kl: float = 1.0,
        optimizer: Optimizer = "sgd",
        lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tau <= 0 or kl < 0 or lr <= 0:
            raise UserError(f"Expected `tau` > 0, `kl` >= 0 and `lr` > 0, got {tau}, {kl} and {lr}.")
        if optimizer not in get_args(Optimizer):
            raise UserError(f"Expected `optimizer` of stage 2 to be 'sgd' or 'adamw', got {optimizer!r}.")
        if generator is not None and not hard and (mean is None or sd is None):
            raise UserError("Expected `mean` and `sd` of the teacher's answers with soft ones, got None.")
        self.student, self.hard, self.tau, self.kl = student, hard, tau, kl
        self.optimizer, self.lr, self.seed = optimizer, lr, seed
        frozen = generator.requires_grad_(False).eval() if generator is not None else None
        object.__setattr__(self, "generator", frozen)  # outside the module tree: frozen, in no checkpoint
        # Unused without a generator.
        self.mean, self.sd = (torch.zeros(()) if t is None else t for t in (mean, sd))
        self._sums = torch.zeros(3)

    @property
    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    def score(self, metrics: Mapping[str, float]) -> float:
        """Negated agreement; ties are broken by the cross entropy, whose term stays below 1e-6."""
        entropy = metrics["mekd/val_loss"]
        return -metrics["mekd/agreement"] + 1e-6 * entropy / (1 + entropy)

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of the student."""
        logits: Tensor = self.student(x)
        return logits

    def on_fit_start(self) -> None:
        """Rejects several processes; moves generator and statistics to the device."""
        super().on_fit_start()
        if self.generator is not None:
            self.generator.to(self.device)
        self.mean, self.sd = self.mean.to(self.device), self.sd.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Seeds the epoch."""
        reseed(self.seed, "stage 2", self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch (x, y)."""
        images, answers = self.losses(self(batch[0]), batch[1])
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        shown = {"mekd/image_loss": images, "mekd/answer_loss": answers, "mekd/lr": lr}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return images + answers

    def losses(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the loss, on images and on answers, from the logits (B, L) of student and teacher."""
        if self.hard:
            return hard_emulation(self.generator, student, teacher.argmax(-1), kl=self.kl)
        return soft_emulation(self.generator, student, teacher, self.mean, self.sd, tau=self.tau, kl=self.kl)

    def on_validation_epoch_start(self) -> None:
        """Resets the sums of matching classes, cross entropy and samples."""
        self._sums = torch.zeros(3, device=self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compares the student's answers with the teacher's."""
        student, teacher = self(batch[0]), batch[1]
        equal = (student.argmax(-1) == teacher.argmax(-1)).sum()
        target = F.one_hot(teacher.argmax(-1), teacher.shape[1]).float() if self.hard else teacher.softmax(-1)
        entropy = F.cross_entropy(student, target, reduction="sum")
        self._sums = self._sums + torch.stack((equal, entropy, torch.tensor(len(student), device=self.device)))

    def on_validation_epoch_end(self) -> None:
        """Logs agreement and cross entropy."""
        equal, entropy, samples = self._sums
        self.log_dict({"mekd/agreement": equal / samples, "mekd/val_loss": entropy / samples}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, with a schedule per step."""
        steps, parameters = int(self.trainer.estimated_stepping_batches), self.student.parameters()
        if self.optimizer == "adamw":
            return adamw_cosine(parameters, self.lr, steps, "step")
        optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9, weight_decay=5e-4)
        cuts = sorted({max(1, steps // 3), max(1, 2 * steps // 3)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, cuts)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
