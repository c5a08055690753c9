"""Stage 1 of MEKD: a GAN on local samples, whose generator emulates the inverse of a black-box teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bdistil.distillation.mekd.networks import Discriminator, Generator
from bdistil.distillation.mekd.stage import EmulationStage
from bdistil.errors import UserError
from bdistil.functional.mekd import (
    balance,
    confidence,
    discriminator_loss,
    generator_loss,
    kernel_distance,
    narrow_distance,
)
from bdistil.teachers.api import ApiTeacher
from bdistil.utils.seeding import reseed, seed_of

PREVIEWS = 256  # number of generated samples for the validation distance


def latents(count: int, outputs: int, *key: object) -> Tensor:
    """Standard normal z (count, L) on the CPU, determined by the key alone."""
    return torch.randn(count, outputs, generator=torch.Generator().manual_seed(seed_of(*key)))


class Deprivatization(EmulationStage):
    """Stage 1: a GAN on local samples, whose generator prefers samples that the teacher classifies confidently.

    Batches are x (B, ...) or begin with it. With `queries`, a pool of that many latents is drawn once; the teacher is
    queried on the sample of a latent when the latent is first used, and the answer is kept although the generator
    changes. Validation costs no query: `mekd/distance` is a kernel distance between generated and held-out local
    samples, `kernel_distance` for images and `narrow_distance` for sequences.

    Args:
        generator: maps z (B, L) to samples; its range is that of the data.
        discriminator: maps samples to logits (B,).
        teacher: the API, queried on generated samples; None for a plain GAN.
        queries: Q, size of the pool of latents; None draws new latents and queries the teacher in every step.
        share: weight of the teacher's term in the generator's loss.
        lr: learning rate of Adam, for both networks; its betas are 0.5 and 0.999.
        average: decay per step of the running mean of the generator's weights, which is evaluated and saved. 0, as in
            the paper, uses the last weights.
        seed: determines, with the epoch, all randomness.

    Raises:
        UserError: an argument is out of its range.
    """

    answers: Tensor
    counts: Tensor
    teacher: ApiTeacher | None

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        teacher: ApiTeacher | None = None,
        *,
        queries: int | None = None,
        share: float = 0.5,
        lr: float = 2e-4,
        average: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if lr <= 0 or share < 0 or not 0 <= average < 1 or (queries is not None and queries < 1):
            raise UserError(
                "Expected `lr` > 0, `share` >= 0, `average` in [0, 1) and `queries` >= 1, "
                f"got {lr}, {share}, {average} and {queries}."
            )
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(average), use_buffers=True)
        self.queries, self.share, self.lr, self.seed = queries, share, lr, seed
        object.__setattr__(self, "teacher", teacher)  # outside the module tree, hence in no checkpoint
        self.register_buffer("answers", torch.full((queries or 0, generator.outputs), torch.nan))
        self.register_buffer("counts", torch.zeros(generator.outputs))
        self._pool = latents(queries or 0, generator.outputs, seed, "stage 1")
        self._held_out: list[Tensor] = []

    @property
    def trained(self) -> Generator:
        """The generator with averaged weights."""
        generator = self.averaged.module
        assert isinstance(generator, Generator)
        return generator

    def score(self, metrics: Mapping[str, float]) -> float:
        """The distance to held-out samples."""
        return metrics["mekd/distance"]

    def forward(self, z: Tensor) -> Tensor:
        """Generates samples (B, ...) from z (B, L) with averaged weights."""
        samples: Tensor = self.averaged(z)
        return samples

    def on_train_epoch_start(self) -> None:
        """Seeds dropout and the latents of the epoch."""
        reseed(self.seed, "stage 1", self.current_epoch)
        self._random = torch.Generator().manual_seed(seed_of(self.seed, "stage 1", self.current_epoch, "z"))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Performs a discriminator step, then a generator step."""
        real, critic = batch[0] if isinstance(batch, tuple | list) else batch, self.discriminator
        z, rows = self._draw(len(real))
        samples = self.generator(z.to(self.device))
        optimizers: Any = self.optimizers()
        critic_loss = self._step(optimizers[0], lambda: discriminator_loss(critic(real), critic(samples.detach())))
        weight = self._teacher_weight(samples.detach(), rows)
        loss = self._step(optimizers[1], lambda: generator_loss(critic(samples), weight, self.share))
        self.averaged.update_parameters(self.generator)
        figures: dict[str, Any] = {
            "mekd/discriminator_loss": critic_loss, "mekd/generator_loss": loss, "mekd/teacher_weight": weight.mean(),
            "mekd/lr": self.lr,
        }  # fmt: skip
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=len(real))

    def _step(self, optimizer: Any, loss_of: Callable[[], Tensor]) -> Tensor:
        self.toggle_optimizer(optimizer)
        loss = loss_of()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        return loss.detach()

    def _draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Latents (m, L) of a step, and their rows (m,) in the pool, if there is one."""
        if self.queries is None:
            return torch.randn(count, self.generator.outputs, generator=self._random), None
        rows = torch.randint(self.queries, (count,), generator=self._random)
        return self._pool[rows], rows

    def _teacher_weight(self, samples: Tensor, rows: Tensor | None) -> Tensor:
        """Weights (m,) of generated samples in the generator's loss: 1 without a teacher."""
        if self.teacher is None:
            return torch.ones(len(samples), device=self.device)
        answers = self._answers(self.teacher, samples, rows)
        return balance(answers.argmax(-1), self.counts) if self.teacher.hard else confidence(answers)

    def _answers(self, teacher: ApiTeacher, samples: Tensor, rows: Tensor | None) -> Tensor:
        """The teacher's logits (m, L) of generated samples, cached by latent where there is a pool."""
        if rows is None:
            answers: Tensor = teacher(samples)
            self.counts += F.one_hot(answers.argmax(-1), self.generator.outputs).sum(0)
            return answers
        rows = rows.to(self.device)
        new = self.answers[rows].isnan().any(-1)
        if bool(new.any()):
            # A latent drawn twice gives the same sample both times, as batch norm sees the whole batch.
            self.answers[rows[new]] = teacher(samples[new])
            known = self.answers[~self.answers.isnan().any(-1)]
            self.counts.copy_(F.one_hot(known.argmax(-1), self.generator.outputs).sum(0))
        return self.answers[rows]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collects held-out local samples."""
        self._held_out.append((batch[0] if isinstance(batch, tuple | list) else batch).detach())

    def on_validation_epoch_end(self) -> None:
        """Logs the distance between generated and held-out local samples."""
        held_out, self._held_out = torch.cat(self._held_out), []
        distance = narrow_distance if held_out.ndim == 3 else kernel_distance
        # On the CPU, as it is computed in float64, which not all devices support.
        self.log("mekd/distance", distance(self.preview(PREVIEWS).cpu(), held_out.cpu()).float(), prog_bar=True)

    @torch.no_grad()
    def preview(self, count: int) -> Tensor:
        """Generated samples (count, ...) from latents that are the same in every epoch."""
        self.averaged.eval()  # never run in training steps
        samples: Tensor = self(latents(count, self.generator.outputs, self.seed, "preview").to(self.device))
        return samples

    def configure_optimizers(self) -> Any:
        """Adam for the discriminator and for the generator."""
        networks = (self.discriminator, self.generator)
        return [torch.optim.Adam(network.parameters(), self.lr, (0.5, 0.999)) for network in networks]
