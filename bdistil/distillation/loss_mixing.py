"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bdistil.boosting.ledger.reductions import BLOCK
from bdistil.boosting.round import BoostingRound
from bdistil.data.loaders.indexing import Index
from bdistil.distillation.mixing_store import MixingStore
from bdistil.distillation.probes import View
from bdistil.errors import UserError
from bdistil.functional.boosting import log_normaliser
from bdistil.functional.loss_mixing import (
    HIGHEST,
    Mode,
    OuterLoss,
    label_target,
    meta_gradient,
    mixed_target,
    outer_loss,
)
from bdistil.utils import distributed
from bdistil.utils.seeding import seed_of

TRAIN_SHARE: dict[str, float] = {"convex": 0.25, "independent": 0.0}


INNER: dict[str, int] = {"convex": 10, "independent": 5}


@dataclass(frozen=True)
class MixingSettings:
    """How the weights of each sample are learned.

    Attributes:
        mode: `convex` (ALM-KD) gives (1 - lambda) to the labels and lambda to the teacher, of several teachers
            1 - max lambda to the labels; `independent` (AMAL) a weight in 0 … 2 to each loss.
        warmup: epochs before the first update.
        every: epochs between two updates.
        inner: steps of an update on each block of samples; 10 of `convex`, 5 of `independent` by default.
        rate: how far an inner step moves the average weight.
        look_ahead: step of the last layer that is looked ahead, as part of the one that would take all of a residual
            away; `lr` takes the student's learning rate as it is, as the authors do. Without `normalise` their updates
            are proportional to it, so the weights freeze when it decays.
        normalise: divide the gradient by its mean size over the block, so that `rate` means the same for any
            network. Without it `rate` multiplies B times the gradient.
        train_share: share of the training part in the outer loss; 0.25 of `convex`, 0 of `independent` by default.
    """

    mode: Mode = "independent"
    warmup: int = 10
    every: int = 10
    inner: int | None = None
    rate: float = 0.05
    look_ahead: float | Literal["lr"] = 1.0
    normalise: bool = True
    train_share: float | None = None

    def __post_init__(self) -> None:
        _require(self, "mode", self.mode in HIGHEST, "'convex' or 'independent'")
        _require(self, "warmup", self.warmup >= 0, ">= 0")
        _require(self, "every", self.every >= 1, ">= 1")
        _require(self, "inner", self.inner is None or self.inner >= 1, ">= 1")
        _require(self, "rate", self.rate > 0, "> 0")
        given = self.look_ahead
        _require(self, "look_ahead", given == "lr" if isinstance(given, str) else given > 0, "> 0, or 'lr'")
        _require(self, "train_share", self.train_share is None or 0 <= self.train_share < 1, "in [0, 1)")

    @property
    def steps(self) -> int:
        """Inner steps of an update."""
        return self.inner or INNER[self.mode]

    @property
    def share(self) -> float:
        """Share of the training part in the outer loss."""
        return TRAIN_SHARE[self.mode] if self.train_share is None else self.train_share

    def columns(self, teachers: int) -> int:
        """C, numbers a sample that are learned."""
        return teachers + (self.mode == "independent")

    def due(self, epoch: int) -> bool:
        """Is an update due before this epoch, from 0?"""
        return epoch >= self.warmup and (epoch - self.warmup) % self.every == 0


def _require(settings: MixingSettings, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"Expected `{name}` of the mixing settings to be {allowed}, got {getattr(settings, name)!r}.")


def start_mix(samples: int, teachers: int, mode: Mode, seed: int) -> Tensor:
    """Where the authors start: U(0, 1) of `convex`, 0.1 for the labels and 0.9 for each teacher of `independent`.

    Args:
        samples: N.
        teachers: M.
        mode: of the weights.
        seed: of the draw.

    Returns:
        Shape (N, C).
    """
    if mode == "convex":
        return torch.rand(samples, teachers, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([0.1] + [0.9] * teachers).repeat(samples, 1)


def move_mix(mix: Tensor, gradient: Tensor, settings: MixingSettings) -> Tensor:
    """One inner step of (B, C) downhill, kept in the range of the mode."""
    scale = gradient.abs().mean().clamp_min(torch.finfo(gradient.dtype).tiny) if settings.normalise else 1 / len(mix)
    return (mix - settings.rate * gradient / scale).clamp(0.0, HIGHEST[settings.mode])


def look_ahead_step(activations: Tensor, settings: MixingSettings, lr: float) -> float:
    """Step of the last layer: with `look_ahead` = 1 a residual of a typical sample moves its own logits by its size.

    Args:
        activations: (B, D).
        settings: of mixing.
        lr: learning rate of the student.
    """
    ahead = settings.look_ahead
    return lr if isinstance(ahead, str) else ahead / float(activations.square().sum(1).mean().clamp_min(1e-12))


def learn_mix(
    mix: Tensor, residuals: Tensor, activations: Tensor, outer: OuterLoss, settings: MixingSettings, lr: float
) -> Tensor:
    """All inner steps of an update on a block of samples, (B, C); arguments as of `meta_gradient` and above."""
    step = look_ahead_step(activations, settings, lr)
    for _ in range(settings.steps):
        gradient = meta_gradient(mix, residuals, activations, outer, mode=settings.mode, step=step)
        mix = move_mix(mix, gradient, settings)
    return mix


def mixed_groups(samples: int, *key: object) -> list[list[int]]:
    """The samples of this process in groups of mixed classes, whatever the order of the dataset.

    Groups are the same for any number of processes, so what is learned is too.

    Args:
        samples: N.
        key: of the draw.
    """
    generator = torch.Generator().manual_seed(seed_of(*key))
    order = torch.randperm(samples, generator=generator).tolist()
    return [order[low:high] for low, high in distributed.my_blocks(samples, BLOCK)]


def update_mix(view: View, store: MixingStore, settings: MixingSettings, *, lr: float, seed: int) -> None:
    """Learns the next version of the numbers of all samples, group by group.

    Args:
        view: of a module in eval mode.
        store: of the numbers (N, C).
        settings: how they are learned.
        lr: learning rate of the module.
        seed: of the groups.
    """
    validation = view.validation()
    store.begin()
    for batch in view.batches(mixed_groups(view.samples, seed, store.round, store.version)):
        seen, index = view.mixing(batch), batch[2]
        outer = outer_loss(validation, view.outer(batch, seen), settings.share)
        mix = store.rows(index).to(seen.logits.device)
        store.write(index, learn_mix(mix, seen.residuals, seen.activations, outer, settings, lr))
    store.keep()


def check_round(module: BoostingRound, settings: MixingSettings) -> None:
    """Refuses what the target of a round can not be mixed of.

    Raises:
        UserError: weights that do not sum to 1, or real outputs.
    """
    if settings.mode != "convex":
        raise UserError(
            "Expected `mode` of the mixing settings to be 'convex' in a boosting run, whose target is a mix of "
            f"label and teacher, got {settings.mode!r}."
        )
    if module.settings.task == "regression":
        raise UserError("Expected a boosting run of classes beside LossMixing, got task='regression'.")


class RoundMix:
    """Target and error of a round, given what was learned of each sample (`functional.loss_mixing.mixed_target`).

    Args:
        module: the round, once its ledger is open.
        store: of one number a sample, the teacher's share.
        labels: of all samples, (N,) on the CPU.
    """

    def __init__(self, module: BoostingRound, store: MixingStore, labels: Tensor) -> None:
        self.module, self.store, self.labels = module, store, labels

    def __call__(self, target: Tensor, error: Tensor, labels: Tensor, index: Index) -> tuple[Tensor, Tensor]:
        """g' and S' (B, L) of a batch."""
        share = self.store.rows(index)[:, 0].to(target.device)
        return mixed_target(target, error, label_target(labels, target.shape[1]), share, self.module.number)

    def install(self) -> None:
        """Makes it the target of the round, and the game that of the errors to it: one pass over the ledger."""
        ledger, total = self.module.ledger, torch.full((self.module.ledger.outputs,), -torch.inf, dtype=torch.float64)
        for low in range(0, ledger.samples, 8 * BLOCK):
            index = np.arange(low, min(low + 8 * BLOCK, ledger.samples))
            _, error = self(*ledger.rows(index), self.labels[index], index)
            total = torch.logaddexp(total, log_normaliser(error.double(), self.module.settings.eta))
        self.module.log_z = total.float().to(self.module.device)
        self.module.mix = self
