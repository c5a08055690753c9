"""MEKD: distillation from an API through a generator that emulates the inverse of the teacher, in two stages.

Stage 1, `Deprivatization`, trains a GAN on local unlabelled samples. Stage 2, `MappingEmulation`, freezes the generator
and trains a student so that its answers and the teacher's become the same samples when they are put through it.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.api_teacher import ApiTeacher
from bdistil.errors import UserError
from bdistil.mekd_losses import (
    balance,
    confidence,
    discriminator_loss,
    generator_loss,
    hard_emulation,
    kernel_distance,
    soft_emulation,
)
from bdistil.mekd_networks import Discriminator, Generator
from bdistil.seeding import reseed, seed_of

PREVIEWS = 256  # generated samples of the validation's distance


def latents(count: int, outputs: int, *key: object) -> Tensor:
    """Standard normal z (count, L): a function of the key alone, on every device."""
    return torch.randn(count, outputs, generator=torch.Generator().manual_seed(seed_of(*key)))


class Deprivatization(pl.LightningModule):
    """Stage 1: a GAN on local samples, whose generator is pulled towards samples that the teacher is sure of.

    Batches are x (B, ...) or begin with it. With `queries`, so many latents are drawn once; the teacher is asked about
    the sample of each when it is first used, and its answer stands for that latent from then on, although the generator
    moves. The validation part says, without a query, how near generated samples are to held-out local ones:
    `mekd/distance`, a kernel distance of the values.

    Args:
        generator: maps z (B, L) to samples; its range is that of the data.
        discriminator: maps samples to logits (B,).
        teacher: the API, asked about generated samples; None for a plain GAN.
        queries: Q, how many latents; None draws new ones and asks in every step.
        share: of the teacher's term in the generator's loss.
        lr: of Adam, for both.
        betas: of Adam.
        seed: all randomness is a function of it and the epoch.

    Raises:
        UserError: an argument is out of its range.
    """

    answers: Tensor
    counts: Tensor

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        teacher: ApiTeacher | None = None,
        *,
        queries: int | None = None,
        share: float = 0.5,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if lr <= 0 or share < 0 or (queries is not None and queries < 1):
            raise UserError(f"Expected `lr` > 0, `share` >= 0 and `queries` >= 1, got {lr}, {share} and {queries}.")
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.queries, self.share, self.lr, self.betas, self.seed = queries, share, lr, betas, seed
        object.__setattr__(self, "teacher", teacher)  # out of the module tree, and so of every checkpoint
        self.register_buffer("answers", torch.full((queries or 0, generator.outputs), torch.nan))
        self.register_buffer("counts", torch.zeros(generator.outputs))
        self._pool = latents(queries or 0, generator.outputs, seed, "stage 1")
        self._held_out: list[Tensor] = []

    teacher: ApiTeacher | None

    @property
    def kept(self) -> nn.Module:
        """What the stage is for."""
        return self.generator

    def forward(self, z: Tensor) -> Tensor:
        """Samples (B, ...) of z (B, L)."""
        samples: Tensor = self.generator(z)
        return samples

    def on_fit_start(self) -> None:
        """Refuses several processes, whose latents and discriminators would drift apart."""
        if self.trainer.world_size > 1:
            raise UserError("Expected one device for the stages of MEKD. Give the Trainer devices=1.")

    def on_train_epoch_start(self) -> None:
        """Seeds dropout and latents of the epoch."""
        reseed(self.seed, "stage 1", self.current_epoch)
        self._random = torch.Generator().manual_seed(seed_of(self.seed, "stage 1", self.current_epoch, "z"))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """A step of the discriminator, then one of the generator."""
        real = batch[0] if isinstance(batch, tuple | list) else batch
        z, rows = self._draw(len(real))
        samples = self.generator(z.to(self.device))
        optimizers: Any = self.optimizers()
        first, second = optimizers
        told = self._step(first, lambda: discriminator_loss(self.discriminator(real), self._of(samples.detach())))
        weight = self._weight(samples.detach(), rows)
        made = self._step(second, lambda: generator_loss(self._of(samples), weight, self.share))
        figures = {"discriminator_loss": told, "generator_loss": made, "teacher_weight": weight.mean(), "lr": self.lr}
        shown: Any = {f"mekd/{name}": value for name, value in figures.items()}
        self.log_dict(shown, on_step=False, on_epoch=True, batch_size=len(real))

    def _of(self, samples: Tensor) -> Tensor:
        logits: Tensor = self.discriminator(samples)
        return logits

    def _step(self, optimizer: Any, loss_of: Any) -> Tensor:
        self.toggle_optimizer(optimizer)
        loss: Tensor = loss_of()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        return loss.detach()

    def _draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Latents (m, L) of a step, and their numbers (m,) in the pool, if there is one."""
        if self.queries is None:
            return torch.randn(count, self.generator.outputs, generator=self._random), None
        rows = torch.randint(self.queries, (count,), generator=self._random)
        return self._pool[rows], rows

    def _weight(self, samples: Tensor, rows: Tensor | None) -> Tensor:
        """What the teacher says of generated samples, (m,): 1 without one."""
        if self.teacher is None:
            return torch.ones(len(samples), device=self.device)
        answers = self._answers(samples, rows)
        return balance(answers.argmax(-1), self.counts) if self.teacher.hard else confidence(answers)

    def _answers(self, samples: Tensor, rows: Tensor | None) -> Tensor:
        """The teacher's logits (m, L) of generated samples, remembered by latent where there is a pool."""
        assert self.teacher is not None
        if rows is None:
            answers: Tensor = self.teacher(samples)
            self.counts += F.one_hot(answers.argmax(-1), self.generator.outputs).sum(0)
            return answers
        rows = rows.to(self.device)
        new = self.answers[rows].isnan().any(-1)
        if bool(new.any()):
            # A latent that was drawn twice has one sample: batch norm sees the whole batch either way.
            self.answers[rows[new]] = self.teacher(samples[new])
            known = self.answers[~self.answers.isnan().any(-1)]
            self.counts.copy_(F.one_hot(known.argmax(-1), self.generator.outputs).sum(0))
        return self.answers[rows]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collects held-out local samples."""
        self._held_out.append((batch[0] if isinstance(batch, tuple | list) else batch).detach())

    def on_validation_epoch_end(self) -> None:
        """Logs the distance between generated and held-out local samples."""
        held_out, self._held_out = torch.cat(self._held_out), []
        self.log("mekd/distance", kernel_distance(self.preview(PREVIEWS), held_out).float(), prog_bar=True)

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Generated samples (count, ...) of latents that are the same in every epoch."""
        mode = self.generator.training
        z = latents(count, self.generator.outputs, self.seed, "preview").to(self.device)
        made: Tensor = self.generator.eval()(z)
        self.generator.train(mode)
        return made

    def configure_optimizers(self) -> Any:
        """Adam for the discriminator and for the generator."""
        return [
            torch.optim.Adam(network.parameters(), self.lr, self.betas)
            for network in (self.discriminator, self.generator)
        ]


class MappingEmulation(pl.LightningModule):
    """Stage 2: trains a student on (x, y), y the teacher's logits (B, L), through the frozen generator.

    The validation part says how often the student gives the teacher's answer, `mekd/agreement`, and its cross entropy
    to the teacher, `mekd/val_loss`: no labels are needed.

    Args:
        student: maps x to logits (B, L).
        generator: trained, of stage 1; None leaves the first part of the loss out, which is plain distillation.
        hard: the teacher gives labels; y are one-hots of any length.
        mean: of the teacher's centred logits (L,), see `mekd_losses.statistics`; for soft answers.
        sd: likewise.
        tau: temperature of soft answers.
        kl: weight of the second part of the loss.
        lr: of SGD with momentum 0.9; a tenth from a third of the steps on, a hundredth from two thirds on.
        weight_decay: of SGD.
        seed: all randomness is a function of it and the epoch.

    Raises:
        UserError: an argument is out of its range, or statistics are missing.
    """

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
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tau <= 0 or kl < 0 or lr <= 0 or weight_decay < 0:
            raise UserError(
                f"Expected `tau` > 0, `kl` >= 0, `lr` > 0, `weight_decay` >= 0, got {tau}, {kl}, {lr}, {weight_decay}."
            )
        if generator is not None and not hard and (mean is None or sd is None):
            raise UserError("Expected `mean` and `sd` of the teacher's answers with soft ones, got None.")
        self.student, self.hard, self.tau, self.kl = student, hard, tau, kl
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed
        frozen = generator.requires_grad_(False).eval() if generator is not None else None
        object.__setattr__(self, "generator", frozen)  # out of the module tree: frozen, in no checkpoint
        self.mean, self.sd = mean, sd
        self._sums = torch.zeros(3)

    generator: Generator | None

    @property
    def kept(self) -> nn.Module:
        """What the stage is for."""
        return self.student

    def forward(self, x: Any) -> Tensor:
        """Logits (B, L) of the student."""
        logits: Tensor = self.student(x)
        return logits

    def on_fit_start(self) -> None:
        """Moves what is hidden to the device."""
        if self.trainer.world_size > 1:
            raise UserError("Expected one device for the stages of MEKD. Give the Trainer devices=1.")
        if self.generator is not None:
            self.generator.to(self.device)
        self.mean, self.sd = (t if t is None else t.to(self.device) for t in (self.mean, self.sd))

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
        """The two parts of the loss, from logits (B, L) of both."""
        if self.generator is None:
            none = torch.zeros((), device=student.device)
            return none, self._plain(student, teacher)
        if self.hard:
            return hard_emulation(self.generator, student, teacher.argmax(-1), kl=self.kl)
        assert self.mean is not None
        assert self.sd is not None
        return soft_emulation(self.generator, student, teacher, self.mean, self.sd, tau=self.tau, kl=self.kl)

    def _plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.hard:
            return self.kl * F.cross_entropy(student, teacher.argmax(-1))
        answer, target = (F.log_softmax(logits / self.tau, -1) for logits in (student, teacher))
        return self.kl * self.tau * F.kl_div(answer, target, reduction="batchmean", log_target=True)

    def on_validation_epoch_start(self) -> None:
        """Starts the sums: answers alike, cross entropy, samples."""
        self._sums = torch.zeros(3, device=self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compares with the teacher on samples that it was asked about."""
        student, teacher = self(batch[0]), batch[1]
        alike = (student.argmax(-1) == teacher.argmax(-1)).sum()
        target = F.one_hot(teacher.argmax(-1), teacher.shape[1]).float() if self.hard else teacher.softmax(-1)
        entropy = F.cross_entropy(student, target, reduction="sum")
        self._sums = self._sums + torch.stack((alike, entropy, torch.tensor(len(student), device=self.device)))

    def on_validation_epoch_end(self) -> None:
        """Logs agreement and cross entropy."""
        alike, entropy, samples = self._sums
        self.log_dict({"mekd/agreement": alike / samples, "mekd/val_loss": entropy / samples}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """SGD, its rate cut to a tenth at a third and at two thirds of the epochs."""
        optimizer = torch.optim.SGD(self.student.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        cuts = sorted({max(1, steps // 3), max(1, 2 * steps // 3)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, cuts)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
