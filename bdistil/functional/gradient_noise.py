"""Gradient noise of distillation, and the distillation weight that reduces it.

The gradient (1 - lambda) grad CE + lambda grad KL is the label gradient with the teacher's as a control variate:
knowledge distillation as partial variance reduction (arXiv 2305.17581). Three second moments give its noise at any
lambda; those of the last linear layer need no backward pass.

Letters: n measured samples, D inputs of the last layer, P parameters, L outputs; for one sample, g is the label
gradient, k the teacher gradient and h = g - k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdistil.errors import UserError

# Values of alpha mu / B for which the best weight is reported, and the default of `suggest`; see `best_weight`.
REPORTED_STEPS = (1e-3, 1e-2, 1e-1)
USUAL_STEP = 1e-2
# Below this mean cross entropy a student fits its labels, and no noise is left to reduce.
INTERPOLATED = 0.01


@dataclass(frozen=True)
class GradientMoments:
    """Second moments of the per-sample label gradient g and teacher gradient k.

    Attributes:
        samples: n.
        gg: mean over the samples of `<g_i, g_i>`.
        kk: mean of `<k_i, k_i>`.
        gk: mean of `<g_i, k_i>`.
        mean_gg: `<mean g, mean g>`.
        mean_kk: `<mean k, mean k>`.
        mean_gk: `<mean g, mean k>`.
        unseen: share of the training part that was not measured; at 0 the mean gradient is exact.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> moments.variance, moments.mean_square
        ((2.0, 2.0, 0.0), (3.0, 4.0, 4.0))
    """

    samples: int
    gg: float
    kk: float
    gk: float
    mean_gg: float
    mean_kk: float
    mean_gk: float
    unseen: float = 1.0

    @property
    def variance(self) -> tuple[float, float, float]:
        """V_gg, V_kk, V_gk: unbiased per-sample variances and covariance."""
        n, pairs = self.samples, ((self.gg, self.mean_gg), (self.kk, self.mean_kk), (self.gk, self.mean_gk))
        gg, kk, gk = ((second - mean) * n / (n - 1) for second, mean in pairs)
        return gg, kk, gk

    @property
    def mean_square(self) -> tuple[float, float, float]:
        """Unbiased `<mean u, mean v>` for gg, kk and gk: the noise term is subtracted, so a value may be negative."""
        gg, kk, gk = (self.unseen * v / self.samples for v in self.variance)
        return self.mean_gg - gg, self.mean_kk - kk, self.mean_gk - gk


def last_layer_moments(
    activations: Tensor, label_residual: Tensor, teacher_residual: Tensor, population: int | None = None
) -> GradientMoments:
    """Moments of the last layer's gradients, from its inputs and the residuals at its output.

    The gradient of a sample is R_i a_i^T, so `<u_i, v_i> = <R_u,i, R_v,i> |a_i|^2` and the mean is R^T A / n.

    Args:
        activations: inputs of the layer (n, D), with a column of ones where it has a bias.
        label_residual: R_g (n, L).
        teacher_residual: R_k (n, L).
        population: N, size of the training part; infinite by default.

    Raises:
        UserError: fewer than two samples.

    Example:
        >>> inputs, residual = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
        >>> last_layer_moments(inputs, residual, residual / 2).variance
        (3.25, 0.8125, 1.625)
    """
    a, g, k = activations.double(), label_residual.double(), teacher_residual.double()
    size = torch.square(a).sum(1)
    second = [((u * v).sum(1) * size).mean() for u, v in ((g, g), (k, k), (g, k))]
    return _moments(len(a), second, g.T @ a / len(a), k.T @ a / len(a), population)


def gradient_moments(
    label_gradients: Tensor, teacher_gradients: Tensor, population: int | None = None
) -> GradientMoments:
    """Moments of per-sample gradients, both (n, P), from a training part of `population` samples.

    Raises:
        UserError: fewer than two samples.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> moments.gg, moments.mean_gg
        (5.0, 4.0)
    """
    g, k = label_gradients.double(), teacher_gradients.double()
    second = [(u * v).sum(1).mean() for u, v in ((g, g), (k, k), (g, k))]
    return _moments(len(g), second, g.mean(0), k.mean(0), population)


def _moments(samples: int, second: Sequence[Tensor], g: Tensor, k: Tensor, population: int | None) -> GradientMoments:
    if samples < 2:
        raise UserError(f"Expected two samples or more to estimate a variance, got {samples}.")
    means = [(u * v).sum() for u, v in ((g, g), (k, k), (g, k))]
    unseen = 1.0 - samples / population if population else 1.0
    gg, kk, gk, mean_gg, mean_kk, mean_gk = (float(value) for value in (*second, *means))
    return GradientMoments(samples, gg, kk, gk, mean_gg, mean_kk, mean_gk, unseen)


# ---- the curves over lambda


def _at(weight: float, scalars: tuple[float, float, float]) -> float:
    gg, kk, gk = scalars
    return (1 - weight) ** 2 * gg + weight**2 * kk + 2 * weight * (1 - weight) * gk


def variance_at(moments: GradientMoments, weight: float) -> float:
    """Var(lambda): variance of the gradient of one sample at a distillation weight.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> variance_at(moments, 0.0), variance_at(moments, 0.5)
        (2.0, 1.0)
    """
    return _at(weight, moments.variance)


def noise_to_signal(moments: GradientMoments, weight: float) -> float:
    """NSR(lambda) = Var / Mean^2 of one sample; infinite if the mean gradient is indistinguishable from 0.

    Unlike the variance, it can be compared across temperatures.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> round(noise_to_signal(moments, 0.0), 3), round(noise_to_signal(moments, 0.5), 3)
        (0.667, 0.267)
    """
    signal = _at(weight, moments.mean_square)
    return variance_at(moments, weight) / signal if signal > 0 else math.inf


def least_variance_weight(moments: GradientMoments) -> float:
    """lambda_minvar = (V_gg - V_gk) / V_hh, in 0 … 1: the weight with the least variance.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> least_variance_weight(moments)
        0.5
    """
    gg, kk, gk = moments.variance
    spread = gg + kk - 2 * gk
    return min(max((gg - gk) / spread, 0.0), 1.0) if spread > 0 else 0.0


def explained_share(moments: GradientMoments) -> float:
    """R^2 = V_gh^2 / (V_gg V_hh): the share of the label gradient's variance that the control variate can remove.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> explained_share(moments)
        0.5
    """
    gg, kk, gk = moments.variance
    spread = gg * (gg + kk - 2 * gk)
    return (gg - gk) ** 2 / spread if spread > 0 else 0.0


def _control(moments: GradientMoments) -> tuple[float, float, float]:
    """E<g,h>, E|h|^2 and |mean h|^2."""
    gg, kk, gk = moments.mean_square
    return moments.gg - moments.gk, moments.gg + moments.kk - 2 * moments.gk, max(gg + kk - 2 * gk, 0.0)


def best_weight(moments: GradientMoments, step: float) -> float:
    """`lambda* = E<g,h> / (E|h|^2 + |mean h|^2 / step)`, in 0 … 1: theoretical optimum near convergence.

    Args:
        moments: measured where training converges.
        step: alpha mu / B, for step size alpha and batches of B samples: a batch has B times less noise than a sample
            and the same bias from the teacher's errors. mu is that of f - f* = mu |x - x*|^2 in the direction of this
            bias, see `pull_curvature`. With it the formula is exact to first order; with mu of strong convexity it
            is a bound.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> round(best_weight(moments, step=0.01), 3)
        0.333
    """
    shared, size, bias = _control(moments)
    spread = size + bias / step
    return min(max(shared / spread, 0.0), 1.0) if spread > 0 else 0.0


def neighbourhood(moments: GradientMoments, weight: float, step: float) -> float:
    """N(lambda) / N(0): distance from the optimum at which SGD settles, relative to that with the labels alone.

    N(lambda) is the sum of the noise alpha / 4B E|g - lambda h|^2 and the bias to the teacher, lambda^2 |mean h|^2 /
    4 mu. At lambda* the ratio is 1 - rho^2 / (1 + beta) of arXiv 2305.17581. Arguments as for
    `best_weight`.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> neighbourhood(moments, 0.5, step=0.01)
        0.95
    """
    shared, size, bias = _control(moments)
    gained = 2.0 * weight * shared - weight**2 * (size + bias / step)
    return 1.0 - gained / moments.gg if moments.gg > 0 else 1.0


def pull_curvature(
    activations: Tensor, logits: Tensor, label_residual: Tensor, teacher_residual: Tensor, iterations: int = 30
) -> float:
    """mu in the direction of the teacher's bias: |m|^2 / (2 m^T H^-1 m), with m the mean of h, H the Hessian of CE.

    Both are those of the last layer, near its optimum. The system is solved by conjugate gradients. Directions much
    flatter than the others, along which training hardly moves either, are left out when the iterations end.

    Logits are (n, L), the other tensors those of `last_layer_moments`. mu is 0 where m is 0.

    Example:
        >>> inputs, residual = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
        >>> round(pull_curvature(inputs, torch.zeros(2, 2), residual, residual / 2), 4)
        0.0625
    """
    p, a = logits.softmax(-1), activations

    labelled = label_residual.any(1, keepdim=True)  # the loss of other samples is 0, and so is their Hessian

    def hessian(direction: Tensor) -> Tensor:
        moved = labelled * p * (a @ direction.T)
        return (moved - p * moved.sum(1, keepdim=True)).T @ a / len(a)

    pull = (label_residual - teacher_residual).T @ a / len(a)
    rest, along, gained, size = pull, pull, 0.0, float(pull.square().sum())
    first = size
    for _ in range(iterations):
        bent = hessian(along)
        curved = float((along * bent).sum())
        if curved <= 0 or size <= 1e-8 * first:
            break
        gained += size**2 / curved
        rest = rest - size / curved * bent
        size, before = float(rest.square().sum()), size
        along = rest + size / before * along
    return first / (2.0 * gained) if gained > 0 else 0.0


# ---- a suggestion


@dataclass(frozen=True)
class Suggestion:
    """A distillation weight and the reason for it."""

    weight: float
    reason: str


def suggest(
    moments: GradientMoments, *, label_loss: float, step: float = USUAL_STEP, highest: float = 0.9
) -> Suggestion:
    """The distillation weight for the next steps: `best_weight`, but not above `least_variance_weight`.

    Too large a weight is much worse than too small a one: no step size removes its bias towards the teacher's
    errors.

    Args:
        moments: measured at the current student.
        label_loss: its mean cross entropy on the same samples.
        step: alpha mu / B, see `best_weight`.
        highest: upper bound of the weight.

    Example:
        >>> moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        >>> suggestion = suggest(moments, label_loss=0.5)
        >>> round(suggestion.weight, 3), suggestion.reason[:24]
        (0.333, 'the teacher explains 50%')
    """
    if label_loss < INTERPOLATED:
        return Suggestion(
            0.0, f"the student fits its labels (cross entropy {label_loss:.2g}): no noise is left to reduce"
        )
    theory, calm = best_weight(moments, step), least_variance_weight(moments)
    weight = min(theory, calm, highest)
    by_step = ", ".join(f"{best_weight(moments, s):.2f} at {s:g}" for s in sorted({*REPORTED_STEPS, step}))
    return Suggestion(
        weight,
        f"the teacher explains {explained_share(moments):.0%} of the label gradient's variance; best weight by step "
        f"size times curvature over batch size: {by_step}; least variance at {calm:.2f}; noise to signal "
        f"{noise_to_signal(moments, 0.0):.3g} without the teacher, {noise_to_signal(moments, weight):.3g} with it",
    )


def scheduled_weight(start: float, factor: float, epoch: int) -> float:
    """Distillation weight of an epoch, in 0 … 1; it is multiplied by `factor` every epoch.

    Example:
        >>> [scheduled_weight(0.8, 0.5, epoch) for epoch in range(3)]
        [0.8, 0.4, 0.2]
    """
    return min(max(start * factor**epoch, 0.0), 1.0)
