"""Per-sample mixing of label loss and teacher loss, learned on a clean validation part: ALM-KD and AMAL.

ALM-KD (arXiv 2202.03250 v1) and AMAL (v3, AAAI 2023) solve min over lambda of CE_val(w*(lambda)), where w* minimises
mean_i [w_i0 CE_i + sum_m w_im KL_im]. One look-ahead step of the last linear layer makes the outer gradient a closed
form.

Letters: K losses (the labels' and one of each of M teachers, K = 1 + M), C numbers a sample that are learned.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bdistil.functional.distillation import KDTerms

Mode = Literal["convex", "independent"]

# What the authors use: range of a weight, learned numbers a sample for M teachers, share of the training part in the
# outer loss, inner steps.
HIGHEST: dict[str, float] = {"convex": 1.0, "independent": 2.0}


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
