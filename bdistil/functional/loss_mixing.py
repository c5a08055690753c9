"""Per-sample mixing of label loss and teacher loss, learned on a clean validation part: ALM-KD and AMAL.

ALM-KD (arXiv 2202.03250 v1) and AMAL (v3, AAAI 2023) minimise CE_val(w*(lambda)) over lambda, where w* minimises
mean_i [w_i0 CE_i + sum_m w_im KL_im]. With one look-ahead step of the last linear layer in place of w*, the gradient of
the outer loss has a closed form.

Letters: K losses (of the labels and of each of M teachers, K = 1 + M), C learned numbers per sample.
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

# For each mode: largest weight, share of training samples in the outer loss, and inner steps, as in the papers.
HIGHEST: dict[str, float] = {"convex": 1.0, "independent": 2.0}
TRAIN_SHARE: dict[str, float] = {"convex": 0.25, "independent": 0.0}
INNER: dict[str, int] = {"convex": 10, "independent": 5}


def loss_weights(mix: Tensor, mode: Mode) -> Tensor:
    """Weights (B, K) of the losses of each sample, the label loss first, from the learned numbers (B, C).

    Example:
        >>> loss_weights(torch.tensor([[0.25], [0.75]]), "convex").tolist()
        [[0.75, 0.25], [0.25, 0.75]]
    """
    return mix if mode == "independent" else torch.cat((1.0 - mix.amax(1, keepdim=True), mix), 1)


def mixed_loss(terms: KDTerms, weights: Tensor) -> Tensor:
    """Mean over the batch of the weighted losses, shape ().

    Args:
        terms: result of `kd_terms` for one or M teachers.
        weights: (B, K), the label loss first.

    Example:
        >>> terms = KDTerms(torch.tensor([1.0]), torch.tensor([2.0]), torch.zeros(1, 2), torch.ones(1, 2))
        >>> mixed_loss(terms, torch.tensor([[0.5, 0.25]]))
        tensor(1.)
    """
    losses = torch.cat((terms.ce[None], terms.kl if terms.kl.ndim == 2 else terms.kl[None]))
    return (losses * weights.T).sum(0).mean()


def residuals_of(terms: KDTerms) -> Tensor:
    """Gradients of the losses with respect to the logits, (K, B, L), the label loss first.

    Example:
        >>> terms = KDTerms(torch.tensor([1.0]), torch.tensor([2.0]), torch.zeros(1, 2), torch.ones(1, 2))
        >>> residuals_of(terms).tolist()
        [[[0.0, 0.0]], [[1.0, 1.0]]]
    """
    teachers = terms.teacher_residual
    return torch.cat((terms.label_residual[None], teachers if teachers.ndim == 3 else teachers[None]))


class OuterLoss(NamedTuple):
    """The outer loss, a cross entropy, as a function of the last layer.

    Attributes:
        activations: inputs of the last layer (n, D), with a column of ones where it has a bias.
        logits: (n, L).
        target: class numbers (n,).
        share: weight of each sample (n,), with sum 1.
        gain: change of the logits per unit change of the last layer's output.

    Example:
        >>> inputs, target = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
        >>> outer = OuterLoss(inputs, torch.zeros(2, 2), target, torch.tensor([0.5, 0.5]))
        >>> outer.slope(torch.zeros(2, 2)).tolist()
        [[0.25, 0.0], [-0.25, 0.0]]
    """

    activations: Tensor
    logits: Tensor
    target: Tensor
    share: Tensor
    gain: float = 1.0

    def slope(self, shift: Tensor) -> Tensor:
        """Gradient (L, D) with respect to the last layer's weights, at the weights plus `shift` (L, D)."""
        logits = self.logits + self.gain * self.activations @ shift.T
        one_hot = torch.nn.functional.one_hot(self.target, logits.shape[1])
        residual = logits.softmax(-1) - one_hot
        gradient: Tensor = (self.gain * residual * self.share[:, None]).T @ self.activations
        return gradient


def outer_loss(validation: OuterLoss, training: OuterLoss, share: float) -> OuterLoss:
    """Outer loss of validation samples and, with the weight `share`, of training samples; both have the same gain.

    Example:
        >>> inputs, target = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
        >>> outer = OuterLoss(inputs, torch.zeros(2, 2), target, torch.tensor([0.5, 0.5]))
        >>> outer_loss(outer, outer, share=0.25).share.tolist()
        [0.375, 0.375, 0.125, 0.125]
    """
    if share == 0:
        return validation
    pairs = zip(validation[:3], training[:3], strict=True)
    joined = [torch.cat(pair) for pair in pairs]
    weights = torch.cat(((1.0 - share) * validation.share, share * training.share))
    return OuterLoss(joined[0], joined[1], joined[2], weights, validation.gain)


def meta_gradient(
    mix: Tensor, residuals: Tensor, activations: Tensor, outer: OuterLoss, *, mode: Mode, step: float
) -> Tensor:
    """Gradient of the outer loss with respect to the learned numbers, after one look-ahead step of the last layer.

    With W' = W - (step/B) sum_k (w_:k R_k)^T A and G the gradient of the outer loss at W', the weight of loss k of
    sample i has the gradient `-(step/B) <R_k,i, G a_i>`. The K sums over validation samples are one product with G.

    Args:
        mix: learned numbers (B, C).
        residuals: gradients of the K losses with respect to the last layer's output, (K, B, L).
        activations: (B, D), with a column of ones where the layer has a bias.
        outer: the outer loss.
        mode: see `MixingSettings`.
        step: size of the look-ahead step.

    Returns:
        Shape (B, C).

    Example:
        >>> inputs, target = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
        >>> outer = OuterLoss(inputs, torch.zeros(2, 2), target, torch.tensor([0.5, 0.5]))
        >>> residuals = torch.tensor([[[-0.5, 0.5], [0.5, -0.5]], [[0.0, 0.0], [0.25, -0.25]]])
        >>> meta_gradient(torch.full((2, 1), 0.5), residuals, inputs, outer, mode="convex", step=0.1)
        tensor([[-0.0096],
                [ 0.0102]])
    """
    scale = step / len(mix)
    pull = (loss_weights(mix, mode).T[..., None] * residuals).sum(0)
    slope = outer.slope(-scale * pull.T @ activations)
    gradient: Tensor = -scale * (residuals * (activations @ slope.T)).sum(-1).T
    if mode == "independent":
        return gradient
    # The weight of the label loss is 1 - max_m lambda_m, so only the largest lambda changes it.
    chosen = mix == mix.amax(1, keepdim=True)
    return gradient[:, 1:] - torch.where(chosen, gradient[:, :1], 0.0)


def label_target(target: Tensor, outputs: int) -> Tensor:
    """Labels as a target in units of the ledger: one-hot, centred, with rms 1, shape (B, L).

    Args:
        target: class numbers (B,).
        outputs: L.

    Example:
        >>> label_target(torch.tensor([1]), outputs=5).tolist()
        [[-0.5, 2.0, -0.5, -0.5, -0.5]]
    """
    one_hot = torch.nn.functional.one_hot(target, outputs).float()
    return (one_hot - 1.0 / outputs) * (outputs / math.sqrt(outputs - 1))


def mixed_target(target: Tensor, error: Tensor, labels: Tensor, share: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Target and running error of a boosting round whose target is a mix of labels and teacher.

    With g' = (1 - lambda) h + lambda g the error after t rounds is S' = S + t (g - g'). So the ledger stores only S,
    the error relative to the teacher, independent of lambda in earlier rounds.

    Args:
        target: g, (B, L).
        error: S, (B, L).
        labels: h, (B, L), from `label_target`.
        share: lambda, (B,).
        rounds: t, committed rounds.

    Returns:
        (g', S'), both (B, L).

    Example:
        >>> g, s, h = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]]), torch.tensor([[-1.0, 1.0]])
        >>> mixed_target(g, s, h, share=torch.tensor([0.5]), rounds=2)
        (tensor([[0., 0.]]), tensor([[ 2.5000, -2.5000]]))
    """
    mixed = torch.lerp(labels, target, share[:, None])
    return mixed, error + rounds * (target - mixed)


def round_residuals(
    answer: Tensor, target: Tensor, error: Tensor, labels: Tensor, *, kappa: float, rounds: int
) -> Tensor:
    """Gradients (2, B, L) of a round's loss for the labels alone and for the teacher alone as target.

    To first order in the game, a student aims at u - kappa S'(u), with target u and S'(u) as in `mixed_target`. The
    gradient of the squared error to it is therefore linear in u, as mixing requires. `answer` is f, (B, L), and kappa
    the correction strength; other arguments as for `mixed_target`.

    Example:
        >>> g, s, h = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]]), torch.tensor([[-1.0, 1.0]])
        >>> round_residuals(torch.zeros(1, 2), g, s, h, kappa=0.5, rounds=1).tolist()
        [[[2.25, -2.25]], [[-0.75, 0.75]]]
    """
    both = torch.stack((labels, target))
    aim = both - kappa * (error + rounds * (target - both))
    return 2.0 / answer.shape[1] * (answer - aim)


# ---- an update of the weights


@dataclass(frozen=True)
class MixingSettings:
    """Settings of the loss weights and their updates.

    Attributes:
        mode: `convex` (ALM-KD) weights the labels by 1 - lambda and the teacher by lambda, or several teachers by their
            lambdas and the labels by 1 - max lambda; `independent` (AMAL) gives each loss a weight in 0 … 2.
        warmup: epochs before the first update.
        every: epochs between two updates.
        inner: steps of an update on each block of samples; by default 10 for `convex`, 5 for `independent`.
        rate: change of the average weight in an inner step.
        look_ahead: size of the look-ahead step, as a share of the step that would remove a whole residual; `lr` uses
            the student's learning rate, as the papers do. Without `normalise` the updates are then proportional to it,
            so the weights freeze when it decays.
        normalise: divide the gradient by its mean magnitude over the block, so that `rate` means the same for
            any network. Without it `rate` multiplies B times the gradient.
        train_share: share of the training part in the outer loss; by default 0.25 for `convex`, 0 for `independent`.

    Raises:
        UserError: a value outside of its range.

    Example:
        >>> settings = MixingSettings(mode="convex", warmup=2, every=3)
        >>> settings.steps, settings.share, [epoch for epoch in range(9) if settings.due(epoch)]
        (10, 0.25, [2, 5, 8])
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

    def due(self, epoch: int) -> bool:
        """Whether an update is due before this epoch, counted from 0."""
        return epoch >= self.warmup and (epoch - self.warmup) % self.every == 0


def _require(settings: MixingSettings, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"Expected `{name}` of the mixing settings to be {allowed}, got {getattr(settings, name)!r}.")


def start_mix(samples: int, teachers: int, mode: Mode, seed: int) -> Tensor:
    """Initial learned numbers (N, C) for N samples and M teachers, as in the papers.

    `convex` draws them from U(0, 1) by seed; `independent` starts at 0.1 for labels and 0.9 for teachers.

    Example:
        >>> start_mix(samples=1, teachers=2, mode="independent", seed=0)
        tensor([[0.1000, 0.9000, 0.9000]])
    """
    if mode == "convex":
        return torch.rand(samples, teachers, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([0.1] + [0.9] * teachers).repeat(samples, 1)


def move_mix(mix: Tensor, gradient: Tensor, settings: MixingSettings) -> Tensor:
    """One step of gradient descent on the learned numbers (B, C), clamped to the range of the mode.

    Example:
        >>> move_mix(torch.tensor([[0.25], [0.75]]), torch.tensor([[1.0], [-1.0]]), MixingSettings(mode="convex"))
        tensor([[0.2000],
                [0.8000]])
    """
    scale = gradient.abs().mean().clamp_min(torch.finfo(gradient.dtype).tiny) if settings.normalise else 1 / len(mix)
    return (mix - settings.rate * gradient / scale).clamp(0.0, HIGHEST[settings.mode])


def learn_mix(
    mix: Tensor, residuals: Tensor, activations: Tensor, outer: OuterLoss, settings: MixingSettings, lr: float
) -> Tensor:
    """Runs all inner steps of an update on a block of samples; returns its learned numbers (B, C).

    With `look_ahead` = 1 the look-ahead step moves the logits of a typical sample by the size of its residual. `lr` is
    the student's learning rate; other arguments as for `meta_gradient`.

    Example:
        >>> inputs, target = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])
        >>> outer = OuterLoss(inputs, torch.zeros(2, 2), target, torch.tensor([0.5, 0.5]))
        >>> residuals = torch.tensor([[[-0.5, 0.5], [0.5, -0.5]], [[0.0, 0.0], [0.25, -0.25]]])
        >>> learn_mix(torch.full((2, 1), 0.5), residuals, inputs, outer, MixingSettings(mode="convex", inner=1), lr=0.1)
        tensor([[0.5424],
                [0.4424]])
    """
    ahead = settings.look_ahead
    step = lr if isinstance(ahead, str) else ahead / float(activations.square().sum(1).mean().clamp_min(1e-12))
    for _ in range(settings.steps):
        gradient = meta_gradient(mix, residuals, activations, outer, mode=settings.mode, step=step)
        mix = move_mix(mix, gradient, settings)
    return mix
