"""Per-sample mixing of label loss and teacher loss, learned on a clean validation part: ALM-KD and AMAL.

ALM-KD (arXiv 2202.03250 v1) and AMAL (v3, AAAI 2023) solve min over lambda of CE_val(w*(lambda)), where w* minimises
mean_i [w_i0 CE_i + sum_m w_im KL_im]. One look-ahead step of the last linear layer makes the outer gradient a closed
form.

Letters: K losses (the labels' and one of each of M teachers, K = 1 + M), C numbers a sample that are learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bdistil.errors import UserError
from bdistil.functional.distillation import KDTerms

Mode = Literal["convex", "independent"]

# Of each mode: the largest weight, the share of training samples in the outer loss and the inner steps of the authors.
HIGHEST: dict[str, float] = {"convex": 1.0, "independent": 2.0}
TRAIN_SHARE: dict[str, float] = {"convex": 0.25, "independent": 0.0}
INNER: dict[str, int] = {"convex": 10, "independent": 5}


def loss_weights(mix: Tensor, mode: Mode) -> Tensor:
    """Weights (B, K) of the losses of each sample, the labels' first, of what is learned (B, C)."""
    return mix if mode == "independent" else torch.cat((1.0 - mix.amax(1, keepdim=True), mix), 1)


def mixed_loss(terms: KDTerms, weights: Tensor) -> Tensor:
    """Mean over the batch of the weighted losses, shape ().

    Args:
        terms: of `kd_terms`, of one teacher or of M.
        weights: (B, K), the labels' first.
    """
    losses = torch.cat((terms.ce[None], terms.kl if terms.kl.ndim == 2 else terms.kl[None]))
    return (losses * weights.T).sum(0).mean()


def residuals_of(terms: KDTerms) -> Tensor:
    """Gradients of the losses with respect to the logits, (K, B, L), the labels' first."""
    teachers = terms.teacher_residual
    return torch.cat((terms.label_residual[None], teachers if teachers.ndim == 3 else teachers[None]))


class OuterLoss(NamedTuple):
    """The cross entropy that the weights are learned for, as a function of the last layer.

    Attributes:
        activations: inputs of the last layer (n, D), with a column of ones where it has a bias.
        logits: (n, L), of which the cross entropy is taken.
        target: class numbers (n,).
        share: weight of each sample (n,), with sum 1.
        gain: by how much the logits rise when the last layer's output rises by one.
    """

    activations: Tensor
    logits: Tensor
    target: Tensor
    share: Tensor
    gain: float = 1.0

    def slope(self, shift: Tensor) -> Tensor:
        """Gradient (L, D) with respect to the last layer's weights, after they have moved by `shift` (L, D)."""
        logits = self.logits + self.gain * self.activations @ shift.T
        one_hot = torch.nn.functional.one_hot(self.target, logits.shape[1])
        residual = logits.softmax(-1) - one_hot
        gradient: Tensor = (self.gain * residual * self.share[:, None]).T @ self.activations
        return gradient


def outer_loss(validation: OuterLoss, training: OuterLoss, share: float) -> OuterLoss:
    """Mixes a share of training samples into the outer loss; both must have the same gain."""
    if share == 0:
        return validation
    pairs = zip(validation[:3], training[:3], strict=True)
    joined = [torch.cat(pair) for pair in pairs]
    weights = torch.cat(((1.0 - share) * validation.share, share * training.share))
    return OuterLoss(joined[0], joined[1], joined[2], weights, validation.gain)


def meta_gradient(
    mix: Tensor, residuals: Tensor, activations: Tensor, outer: OuterLoss, *, mode: Mode, step: float
) -> Tensor:
    """Gradient of the outer loss with respect to what is learned, after one look-ahead step of the last layer.

    With W' = W - (step/B) sum_k (w_:k R_k)^T A and G the gradient of the outer loss at W', the weight of loss k of
    sample i has the gradient -(step/B) <R_k,i, G a_i>. The K sums over validation samples are one product with G.

    Args:
        mix: (B, C).
        residuals: gradients of the K losses with respect to the last layer's output, (K, B, L).
        activations: (B, D), with a column of ones where the layer has a bias.
        outer: the outer loss.
        mode: of the weights.
        step: of the look-ahead.

    Returns:
        Shape (B, C).
    """
    scale = step / len(mix)
    pull = (loss_weights(mix, mode).T[..., None] * residuals).sum(0)
    slope = outer.slope(-scale * pull.T @ activations)
    gradient: Tensor = -scale * (residuals * (activations @ slope.T)).sum(-1).T
    if mode == "independent":
        return gradient
    # The labels' weight is 1 - max_m lambda_m, so the largest lambda takes from it.
    chosen = mix == mix.amax(1, keepdim=True)
    return gradient[:, 1:] - torch.where(chosen, gradient[:, :1], 0.0)


def label_target(target: Tensor, outputs: int) -> Tensor:
    """What labels ask of a student in units of the ledger: one-hot, centred, of rms 1, shape (B, L).

    Args:
        target: class numbers (B,).
        outputs: L.
    """
    one_hot = torch.nn.functional.one_hot(target, outputs).float()
    return (one_hot - 1.0 / outputs) * (outputs / math.sqrt(outputs - 1))


def mixed_target(target: Tensor, error: Tensor, labels: Tensor, share: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Target and running error of a boosting round whose target is a mix of labels and teacher.

    With g' = (1 - lambda) h + lambda g the error to it is S' = S + t (g - g') after t rounds, so S of the ledger, which
    is against the teacher, is all that has to be kept, whatever lambda was in earlier rounds.

    Args:
        target: g, (B, L).
        error: S, (B, L).
        labels: h, (B, L), of `label_target`.
        share: lambda, (B,).
        rounds: t, committed rounds.

    Returns:
        (g', S'), both (B, L).
    """
    mixed = torch.lerp(labels, target, share[:, None])
    return mixed, error + rounds * (target - mixed)


def round_residuals(
    answer: Tensor, target: Tensor, error: Tensor, labels: Tensor, *, kappa: float, rounds: int
) -> Tensor:
    """Gradients (2, B, L) of a round's loss where its target is the labels alone, and the teacher alone.

    To the first order of the game a student aims at u - kappa S'(u), with S'(u) of `mixed_target`, so the gradient of
    the squared error to that aim is linear in the target u, as mixing asks for.

    Args:
        answer: f, (B, L).
        target: g, (B, L).
        error: S, (B, L).
        labels: h, (B, L).
        kappa: correction strength.
        rounds: t, committed rounds.
    """
    both = torch.stack((labels, target))
    aim = both - kappa * (error + rounds * (target - both))
    return 2.0 / answer.shape[1] * (answer - aim)


# ---- an update of the weights


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
